"""Fronts and engines on different hosts: real Ray, real addresses, token authentication."""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster import processes
from cluster.network import Network
from deployments.serve_rest import DeployFailed, ServeRest, replicas
from tests.e2e.conftest import application
from tests.hosts import HostStack, host_stack, needs_hosts

pytestmark = needs_hosts
ENGINE = "engine-smollm2"
ONE_A_HOST = {"num_replicas": 2, "max_replicas_per_node": 1}


@pytest.fixture(scope="module")
def stack() -> Iterator[HostStack]:
    with host_stack(num_hosts=3) as stack:
        stack.deploy(application(num_kv_tokens=4096, num_threads=1), front=ONE_A_HOST, engine_smollm2=ONE_A_HOST)
        yield stack


def complete(stack: HostStack, prompt: str) -> Any:
    body = {"model": "smollm2", "prompt": prompt, "max_tokens": 8, "temperature": 0}
    response = httpx.post(f"{stack.url}/v1/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def tokens_of_engines(stack: HostStack) -> dict[str, float]:
    """Generated tokens by engine replica."""
    text = httpx.get(f"{stack.url}/metrics", timeout=30).text
    return {
        sample.labels["engine"]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "vllm:generation_tokens_total"
    }


def test_tokens_travel_between_hosts(stack: HostStack) -> None:
    """Two fronts and two engines on three hosts: one engine at least is not where the front is."""
    placed = replicas(stack.rest.status())
    assert len({host for name, host in placed if name == ENGINE}) == 2
    assert len({host for name, host in placed if name == "front"}) == 2
    answers = {complete(stack, "The capital of France is") for _ in range(12)}
    assert len(answers) == 1
    assert "Paris" in answers.pop()
    assert all(tokens > 0 for tokens in tokens_of_engines(stack).values())
    assert len(tokens_of_engines(stack)) == 2


def test_nobody_deploys_without_the_token(stack: HostStack) -> None:
    with pytest.raises(DeployFailed, match="401"):
        ServeRest(stack.cluster.dashboard).status()
    command = [sys.executable, "-W", "ignore", "-c", "import ray; ray.init('10.77.0.1:6379')"]
    command[-1] = command[-1].replace("10.77.0.1", stack.cluster.head.address)
    environment = stack.cluster.environment | {"RAY_AUTH_TOKEN_PATH": "/dev/null"}
    with (stack.cluster.directory / "intruder.log").open("wb") as log:
        assert stack.cluster.head.start(command, environment, log).wait(60) != 0
    assert "token" in (stack.cluster.directory / "intruder.log").read_text().lower()


def test_moray_listens_on_the_address_of_its_host_and_nowhere_else(stack: HostStack) -> None:
    """Of the replicas' processes; Ray's own listen as Ray does."""
    placed = replicas(stack.rest.status())
    for host in stack.cluster.hosts:
        fronts = [name for name, address in placed if address == host.address and name == "front"]
        listening = subprocess.run(
            ["ip", "netns", "exec", host.name, "ss", "-Htlnp"], capture_output=True, text=True, check=True
        ).stdout
        pids = {pid for pid in host.pids() if "ServeReplica:moray:front" in " ".join(psutil.Process(pid).cmdline())}
        assert len(pids) == len(fronts)
        for pid in pids:
            addresses = [line.split()[3] for line in listening.splitlines() if f"pid={pid}," in line]
            assert any(address.startswith(f"{host.address}:") for address in addresses)


def test_num_replicas_is_applied_in_place(stack: HostStack) -> None:
    args = application(num_kv_tokens=4096, num_threads=1)
    status = stack.deploy(args, front=ONE_A_HOST, engine_smollm2={"num_replicas": 3, "max_replicas_per_node": 1})
    assert len([name for name, _ in replicas(status) if name == ENGINE]) == 3
    complete(stack, "Once upon a time")


def test_the_death_of_a_host_leaves_the_others_serving(stack: HostStack) -> None:
    before = complete(stack, "Water boils at")
    placed = replicas(stack.rest.status())
    fronts = {host for name, host in placed if name == "front"}
    victim = min(stack.cluster.hosts[1:], key=lambda host: host.address in fronts)  # both may have a front
    assert (ENGINE, victim.address) in placed
    victim.kill()
    assert victim.pids() == []
    begin = time.monotonic()
    answers = []
    while len(answers) < 3:
        assert time.monotonic() < begin + 90
        with suppress(httpx.HTTPError, AssertionError):
            answers.append(complete(stack, "Water boils at"))
    assert set(answers) == {before}


def test_hosts_end_with_the_process_that_made_them() -> None:
    """Even if it is killed. Namespaces stay, empty, until the next network takes them down."""
    code = """
import time
from cluster.hosts import HostCluster
with HostCluster(1) as cluster:
    print(cluster.head.name, cluster.directory / "h1", flush=True)
    time.sleep(60)
"""
    owner = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    name, directory = owner.stdout.readline().split()
    owner.stdout.close()
    assert len(processes.of_run(Path(directory))) > 3
    owner.kill()
    owner.wait()
    deadline = time.monotonic() + 10
    while processes.of_run(Path(directory)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert processes.of_run(Path(directory)) == []
    with Network(1) as network:
        namespaces = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
        assert network.hosts[0].name == name or name not in namespaces.split()
    shutil.rmtree(Path(directory).parent)
