import shutil
import subprocess

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.parser import text_string_to_metric_families

from deployments.metrics import Snapshot, render, snapshot

LINT_ONLY = 3
"""promtool's exit code for text that parses but has lint."""


def replica(engine: str, running: int) -> Snapshot:
    registry = CollectorRegistry()
    labels = ["model_name", "engine"]
    Gauge("vllm:num_requests_running", "Running requests.", labels, registry=registry).labels("m", engine).set(running)
    Counter("vllm:prompt_tokens", "Prompt tokens.", labels, registry=registry).labels("m", engine).inc(running * 10)
    latency = Histogram("vllm:e2e_request_latency_seconds", "Latency.", labels, buckets=(0.5, 1), registry=registry)
    latency.labels("m", engine).observe(0.7)
    return snapshot(registry)


def test_families_of_many_replicas_are_rendered_once_with_every_series() -> None:
    text = render([replica("a", 1), replica("b", 2)]).decode()
    assert text.count("# TYPE vllm:num_requests_running gauge") == 1
    assert text.count("# TYPE vllm:prompt_tokens_total counter") == 1
    samples = {
        (sample.name, sample.labels["engine"], sample.labels.get("le")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["vllm:num_requests_running", "a", None] == 1
    assert samples["vllm:num_requests_running", "b", None] == 2
    assert samples["vllm:prompt_tokens_total", "b", None] == 20
    assert samples["vllm:e2e_request_latency_seconds_bucket", "a", "0.5"] == 0
    assert samples["vllm:e2e_request_latency_seconds_bucket", "a", "1.0"] == 1
    assert samples["vllm:e2e_request_latency_seconds_count", "b", None] == 1


def test_creation_times_are_left_out() -> None:
    assert "_total" in replica("a", 1)
    assert "_created" not in replica("a", 1)


def test_a_family_without_series_is_no_harm() -> None:
    registry = CollectorRegistry()
    for name in ("moray:none", "moray:none_either"):
        Gauge(name, "None yet.", ["engine"], registry=registry)
    text = render([replica("a", 1), snapshot(registry), "", snapshot(registry)]).decode()
    assert text.endswith(snapshot(registry))
    assert [family.name for family in text_string_to_metric_families(text)][3:] == ["moray:none", "moray:none_either"]


def test_label_values_are_escaped() -> None:
    name = 'quote " backslash \\ newline \n# HELP x y\n'
    text = render([replica(name, 1), replica("b", 1)]).decode()
    family = next(iter(text_string_to_metric_families(text)))
    assert [sample.labels["engine"] for sample in family.samples] == [name, "b"]


def test_one_name_with_two_types_is_refused() -> None:
    counters, gauges = CollectorRegistry(), CollectorRegistry()
    Counter("moray:x", "x", registry=counters)
    Gauge("moray:x_total", "x", registry=gauges)
    with pytest.raises(ValueError, match="moray:x_total is a counter in one replica and a gauge in another"):
        render([snapshot(counters), snapshot(gauges)])


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian package prometheus) is not installed")
def test_promtool_accepts_the_exposition() -> None:
    """It parses; the one lint is about the colons of vLLM's own names, which dashboards rely on."""
    text = render([replica("a", 1), replica("b", 2)])
    result = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)
    problems = [line for line in result.stderr.decode().splitlines() if "should not contain ':'" not in line]
    assert not problems
    assert result.returncode in (0, LINT_ONLY)
