"""Tensor-parallel ranks and pipeline stages on different hosts: the same tokens as one rank."""

from typing import Any

import httpx
import psutil
import pytest

from tests.e2e.conftest import application
from tests.hosts import HostStack, host_stack, needs_hosts

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
