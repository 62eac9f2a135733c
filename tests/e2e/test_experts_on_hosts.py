"""configs/smollm2-moe-hosts.yaml: an expert server on each of four hosts is killed, frozen, cut off; nobody notices."""

from collections.abc import Iterator

import httpx
import pytest

from benchmarks.soak.disturbances import KILL, STOP, Disturbances, cut
from benchmarks.soak.run import soak
from benchmarks.soak.stacks import MODEL, on_hosts
from benchmarks.soak.target import Target
from deployments.serve_rest import replicas
from tests.hosts import HostStack, needs_hosts
from tests.stack import needs_moe

pytestmark = [needs_hosts, needs_moe]


@pytest.fixture(scope="module")
def stack() -> Iterator[HostStack]:
    with on_hosts(4) as stack:
        yield stack


def test_every_expert_is_on_two_hosts(stack: HostStack) -> None:
    placed = replicas(stack.rest.status())
    addresses = [host.address for host in stack.cluster.hosts]
    assert [host for name, host in placed if name == f"experts-{MODEL}"] == addresses
    assert [host for name, host in placed if name != f"experts-{MODEL}"] == 3 * [stack.cluster.head.address]
    servers = httpx.get(f"{stack.url}/cluster", timeout=30).raise_for_status().json()["experts"]
    hosts: dict[tuple[int, int], set[str]] = {}
    for server in servers:
        for layer, expert in server["experts"]:
            hosts.setdefault((layer, expert), set()).add(server["host"])
    assert len(hosts) == 30 * 8
    assert min(map(len, hosts.values())) == 2


@pytest.mark.timeout(400)
async def test_a_death_a_freeze_and_a_cut_link_cost_nothing(stack: HostStack) -> None:
    kinds = [KILL, STOP, cut(stack.cluster.hosts, stack.cluster.head)]
    report = await soak(Target(stack.url, MODEL), Disturbances(kinds, 3), calm_seconds=20)
    print(report)
    assert report["requests"] > 30
    assert report["compared"] > 15
    assert report["lost"] == report["changed"] == report["several_answers"] == 0
    assert report["failovers"] >= 1
    assert max(report["restored_s"]) < 15
    assert report["longest_ms"] < report["calm_p99_ms"] + 1000  # 300 on a quiet machine: `make soak-experts`
