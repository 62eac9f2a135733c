from pathlib import Path

from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

from cluster.haproxy import configuration_files, keep_to_loopback


def test_ports_without_an_address_of_serves_own_template_are_narrowed() -> None:
    """Fails when Ray changes the template, before a port is open to the network."""
    narrowed = keep_to_loopback(HAPROXY_CONFIG_TEMPLATE)
    assert "bind 127.0.0.1:{{ config.metrics_port }}" in narrowed
    assert "bind 127.0.0.1:{{ config.stats_port }}" in narrowed
    assert "bind :" not in narrowed
    assert "bind *" not in narrowed
    assert "bind {{ config.frontend_host }}:{{ config.frontend_port }}" in narrowed


def test_narrowing_twice_changes_nothing() -> None:
    once = keep_to_loopback(HAPROXY_CONFIG_TEMPLATE)
    assert keep_to_loopback(once) == once


def test_files_are_those_after_f() -> None:
    assert configuration_files(["moray-haproxy", "-db", "-f", "/a", "-sf", "12"]) == [Path("/a")]
