"""`make serve` and `make stop`, with the configuration that a newcomer gets."""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from cluster import processes
from tests.stack import ROOT, Stack, free_port

MODEL = "SmolLM2-135M-Instruct"


def quickstart(**http: Any) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text())
    config["http_options"] |= {"port": free_port(), **http}
    return config


def failure(folder: Path, config: dict[str, Any]) -> str:
    """What a serve that must fail says; it must leave nothing behind."""
    stack = Stack(folder, config)
    command = stack.command("serve", str(stack.config))
    result = subprocess.run(
        command, capture_output=True, text=True, env=stack.environment, cwd=ROOT, timeout=120, check=False
    )
    assert result.returncode == 1, result.stdout
    assert not Path(stack.environment["MORAY_STATE"]).exists()
    return result.stderr


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("quickstart"), quickstart())
    stack.start()
    yield stack
    if stack.process.poll() is None:
        stack.stop()


def chat(stack: Stack) -> httpx.Response:
    message = {"role": "user", "content": "Name three oceans."}
    body = {"model": MODEL, "messages": [message], "max_tokens": 16}
    return httpx.post(f"{stack.url}/v1/chat/completions", json=body, timeout=60)


def test_it_answers_and_says_how_to_ask(stack: Stack) -> None:
    answer = chat(stack).raise_for_status().json()
    assert answer["usage"]["completion_tokens"] > 0
    last_line = stack.log.read_text().splitlines()[-1]
    assert last_line.startswith(f"curl {stack.url}/v1/chat/completions")
    printed = subprocess.run(last_line, shell=True, capture_output=True, text=True, timeout=60, check=True)
    assert '"role":"assistant"' in printed.stdout


def test_metrics_of_every_replica_are_valid(stack: Stack) -> None:
    text = httpx.get(f"{stack.url}/metrics").raise_for_status().content
    assert b"vllm:num_requests_running{" in text
    assert b"vllm:time_to_first_token_seconds_bucket{" in text
    if promtool := shutil.which("promtool"):
        result = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, check=False)
        assert result.returncode in (0, 3), result.stderr  # 3: parsed, with lint about vLLM's own names


def test_every_port_is_on_loopback(stack: Stack) -> None:
    ours = {process.pid for process in processes.of_run(stack.run)} | {stack.process.pid}
    listening = [
        connection
        for connection in psutil.net_connections("tcp")
        if connection.pid in ours and connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) > 5
    for connection in listening:
        assert connection.laddr.ip.removeprefix("::ffff:") in ("127.0.0.1", "::1"), connection


def test_a_second_serve_is_refused_and_harms_nothing(stack: Stack, tmp_path: Path) -> None:
    command = stack.command("serve", str(stack.config))
    twice = subprocess.run(command, capture_output=True, text=True, env=stack.environment, cwd=ROOT, check=False)
    assert twice.returncode == 1
    assert "already serving" in twice.stderr
    port = int(stack.url.rsplit(":", 1)[1])
    elsewhere = Stack(tmp_path, quickstart(port=port))
    command = elsewhere.command("serve", str(elsewhere.config))
    taken = subprocess.run(command, capture_output=True, text=True, env=elsewhere.environment, cwd=ROOT, check=False)
    assert taken.returncode == 1
    assert f"port {port} of 127.0.0.1 is taken by haproxy" in taken.stderr
    assert chat(stack).status_code == 200


def test_num_replicas_changes_in_place(stack: Stack) -> None:
    """While it answers."""
    line = next(line for line in stack.log.read_text().splitlines() if "serve deploy" in line)
    dashboard = line.split(" -a ")[1].split()[0]
    config = yaml.safe_load(stack.config.read_text())
    config["applications"][0]["deployments"][0]["num_replicas"] = 2
    changed = stack.config.with_name("changed.yaml")
    changed.write_text(yaml.safe_dump(config))
    serve = str(Path(sys.executable).with_name("serve"))
    token = stack.environment | {"RAY_AUTH_MODE": "token"}
    _wait_for(dashboard)
    assert len(fronts(stack)) == 1
    with ThreadPoolExecutor() as pool:
        ended = threading.Event()
        asking = [pool.submit(ask_until, ended, stack) for _ in range(3)]
        try:
            subprocess.run(
                [serve, "deploy", "-a", dashboard, str(changed)], env=token, cwd=ROOT, check=True, timeout=60
            )
            deadline = time.monotonic() + 60
            while len(fronts(stack)) < 2:
                assert time.monotonic() < deadline, "no second front"
                time.sleep(0.5)
            time.sleep(1.0)  # it is given requests, too
        finally:
            ended.set()
    answers = [answer for each in asking for answer in each.result()]
    assert len(answers) > 3
    assert {answer.status_code for answer in answers} == {200}


def fronts(stack: Stack) -> set[int]:
    """Process ids of those that answer."""
    described = httpx.get(f"{stack.url}/cluster", timeout=30).raise_for_status().json()
    return {front["pid"] for front in described["fronts"]}


def ask_until(ended: threading.Event, stack: Stack) -> list[httpx.Response]:
    answers = []
    while not ended.is_set():
        answers.append(chat(stack))
    return answers


def test_stop_leaves_no_process(stack: Stack) -> None:
    """Nor files, nor the port; and it is quick. Last: it ends the module's stack."""
    run = stack.run
    assert processes.of_run(run)
    begin = time.monotonic()
    assert "Stopped" in stack.stop()
    assert time.monotonic() - begin < 15
    assert stack.process.returncode == 0
    assert not processes.of_run(run)
    assert not run.exists()
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", int(stack.url.rsplit(":", 1)[1])))
    assert "Nothing is being served" in stack.stop()


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("args", "models", 0, "path"), "models/absent.gguf", "models/absent.gguf"),
        (("args", "models", 0, "engine", "max_num_seq"), 3, "did you mean 'max_num_seqs'"),
        (("deployments", 1, "num_replicas"), 2 * (os.cpu_count() or 1), "this machine has"),
    ],
)
def test_what_cannot_work_is_said_at_once(
    tmp_path: Path, place: tuple[str | int, ...], value: Any, message: str
) -> None:
    config = quickstart()
    part = config["applications"][0]
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    begin = time.monotonic()
    assert message in failure(tmp_path, config)
    assert time.monotonic() - begin < 20


def _wait_for(dashboard: str) -> None:
    """The dashboard comes up after the application."""
    for _ in range(300):
        try:
            httpx.get(dashboard)
            return
        except httpx.TransportError:
            time.sleep(0.1)
    pytest.fail("no dashboard")
