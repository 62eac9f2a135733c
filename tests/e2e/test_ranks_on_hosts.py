"""Tensor-parallel ranks and pipeline stages on different hosts: the same tokens as one rank."""

import re
import time
from typing import Any

import httpx
import psutil
import pytest

from tests.e2e.conftest import application
from tests.hosts import HostStack, host_stack, needs_hosts
from tests.stack import serve_yaml

pytestmark = needs_hosts
PROMPT = "The capital of France is"
ONE_A_HOST = {"CPU": 1.5}
"""Hosts have two CPUs: no two ranks fit on one."""


def complete(stack: HostStack) -> str:
    body = {"model": "smollm2", "prompt": PROMPT, "max_tokens": 16, "temperature": 0}
    response = httpx.post(f"{stack.url}/v1/completions", json=body, timeout=90)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def hosts_of_ranks(stack: HostStack) -> list[str]:
    """The address of each rank's host; the first rank is the engine's own process."""
    return [
        host.address
        for host in stack.cluster.hosts
        for pid in host.pids()
        if psutil.Process(pid).cmdline()[0].startswith(("ray::Rank", "ray::ServeReplica:moray:engine-"))
    ]


@pytest.mark.timeout(400)
def test_ranks_on_three_hosts_say_what_one_rank_says() -> None:
    with host_stack(num_hosts=3, num_cpus=2) as stack:
        settings: dict[str, Any] = {"num_kv_tokens": 2048, "num_threads": 1}
        stack.deploy(application(**settings))
        expected = complete(stack)
        assert "Paris" in expected
        for sizes in ({"tensor_parallel_size": 3}, {"pipeline_parallel_size": 3}):
            stack.deploy(application(**settings, **sizes, bundle_per_rank=ONE_A_HOST))
            assert complete(stack) == expected
            assert hosts_of_ranks(stack) == [host.address for host in stack.cluster.hosts]


@pytest.mark.timeout(400)
def test_ranks_without_room_say_so_and_start_when_there_is_some() -> None:
    """The hosts have enough in all, so that the application is not refused; another holds it."""
    settings: dict[str, Any] = {"num_kv_tokens": 2048, "num_threads": 1}
    holder, waiting = serve_yaml(application(**settings)), serve_yaml(application(**settings, tensor_parallel_size=3))
    holding, asking = holder["applications"] + waiting["applications"]
    for deployment, num_cpus in zip(holding["deployments"], (0.1, 1.8), strict=True):
        deployment["ray_actor_options"] = {"num_cpus": num_cpus}
    asking |= {"name": "second", "route_prefix": "/second", "deployments": holding["deployments"][:1]}
    with host_stack(num_hosts=2, num_cpus=2) as stack:
        stack.deploy_config(holder)
        stack.rest.deploy(holder | {"applications": [holding, asking]})
        deadline, told = time.monotonic() + 60, ""
        while "fits on no node" not in told:
            assert time.monotonic() < deadline, told
            time.sleep(1)
            told = httpx.get(f"{stack.url}/second/health", timeout=30).text
        assert re.search(
            r"engine-smollm2 waits for room: bundle [12] of 3 \(CPU 1\) fits on no node beside the [12] before it. "
            r"Left there: node \S+ \(\w+\) CPU 0.*; node \S+ \(\w+\) CPU 0",
            told,
        )
        stack.deploy_config(holder | {"applications": [asking]})
        stack.url += "/second"
        assert "Paris" in complete(stack)
