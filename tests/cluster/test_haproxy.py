"""What is changed in the configuration that Serve writes, and that the real HAProxy then does what it is for."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

from cluster.haproxy import HAPROXY, configuration_files, keep_for_retries, keep_to_loopback
from cluster.serve_settings import SETTINGS
from tests.stack import free_port

BACKEND = """
import sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.answer(b"")
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        time.sleep(1.5)
        self.answer(sys.argv[1].encode())
    def answer(self, body):
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_ports_without_an_address_of_serves_own_template_are_narrowed() -> None:
    """Fails when Ray changes the template, before a port is open to the network."""
    narrowed = keep_to_loopback(HAPROXY_CONFIG_TEMPLATE)
    assert "bind 127.0.0.1:{{ config.metrics_port }}" in narrowed
    assert "bind 127.0.0.1:{{ config.stats_port }}" in narrowed
    assert "bind :" not in narrowed
    assert "bind *" not in narrowed
    assert "bind {{ config.frontend_host }}:{{ config.frontend_port }}" in narrowed


def test_requests_are_kept_for_retries_in_serves_own_template() -> None:
    template = HAPROXY_CONFIG_TEMPLATE.replace("{{ config.retry_on }}", SETTINGS["RAY_SERVE_HAPROXY_RETRY_ON"])
    assert keep_for_retries(template).count("    option http-buffer-request\n") == 1
    assert keep_for_retries(HAPROXY_CONFIG_TEMPLATE) == HAPROXY_CONFIG_TEMPLATE


@pytest.mark.parametrize("change", [keep_to_loopback, keep_for_retries])
def test_changing_twice_changes_nothing(change) -> None:
    template = HAPROXY_CONFIG_TEMPLATE.replace("{{ config.retry_on }}", SETTINGS["RAY_SERVE_HAPROXY_RETRY_ON"])
    once = change(template)
    assert change(once) == once != template


def test_files_are_those_after_f() -> None:
    assert configuration_files(["moray-haproxy", "-db", "-f", "/a", "-sf", "12"]) == [Path("/a")]


@pytest.fixture
def two_backends(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A real HAProxy's URL before two servers, and the first of them."""
    front, *ports = (free_port() for _ in range(3))
    configuration = f"""
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    option abortonclose
    option redispatch 1
    retry-on {SETTINGS["RAY_SERVE_HAPROXY_RETRY_ON"]}
    balance leastconn
listen both
    bind 127.0.0.1:{front}
    http-reuse always
    server first 127.0.0.1:{ports[0]} check inter 100ms
    server second 127.0.0.1:{ports[1]} check inter 100ms
"""
    path = tmp_path / "haproxy.cfg"
    path.write_text(keep_for_retries(configuration))
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    processes = [subprocess.Popen([sys.executable, "-c", BACKEND, str(port)], **quiet) for port in ports]
    processes.append(subprocess.Popen([HAPROXY, "-f", str(path)], **quiet))
    for port in (*ports, front):
        _await(f"http://127.0.0.1:{port}")
    yield f"http://127.0.0.1:{front}", processes[0]
    for process in processes:
        process.kill()
        process.wait()


def test_a_request_goes_to_another_server_when_the_first_dies_before_it_answers(two_backends) -> None:
    url, first = two_backends
    with httpx.Client(base_url=url, timeout=20) as client, ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(client.post, "/", content=b"x" * 10_000) for _ in range(6)]
        time.sleep(0.7)
        first.send_signal(signal.SIGKILL)
        assert [answer.result().status_code for answer in answers] == [200] * 6


def _await(url: str) -> None:
    for _ in range(100):
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    pytest.fail(f"{url} does not answer")
