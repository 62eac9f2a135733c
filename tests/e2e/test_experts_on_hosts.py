"""configs/smollm2-moe-hosts.yaml: expert servers on four hosts are killed, frozen, cut off, slowed; nobody notices."""

from collections.abc import Iterator

import httpx
import pytest

from benchmarks.soak.disturbances import KILL, STOP, Disturbances, cut, slow
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


@pytest.mark.timeout(450)
async def test_a_death_a_freeze_a_cut_and_a_slowed_link_cost_nothing(stack: HostStack) -> None:
    links, target = (stack.cluster.hosts, stack.cluster.head), Target(stack.url, MODEL)
    disturbances = Disturbances([KILL, STOP, cut(*links), slow(*links)], 4)
    report = await soak(target, disturbances, calm_seconds=20)
    print(report)
    assert report["requests"] > 30
    assert report["compared"] > 15
    assert report["lost"] == report["changed"] == report["several_answers"] == 0
    assert report["failovers"] >= 1
    assert report["failovers_of_disturbed"][-1] > 2  # it answers, so it is asked again, and is late again
    slowed = disturbances.happened[-1][1]
    assert slowed in target.servers()  # late, not silent: it has not been replaced
    assert max(report["restored_s"]) < 15
    assert report["longest_ms"] < report["calm_p99_ms"] + 1000  # 300 on a quiet machine: `make soak-experts`
