"""Real expert servers are killed, frozen, slowed, fed garbage: the same bits return, in the same step, in time."""

import signal
import threading
import time
from contextlib import closing
from pathlib import Path

import psutil
import pytest
import torch

from cluster.experts import fast_path
from cluster.experts.client import ExpertClient, ExpertsUnavailable, _Exchanged
from cluster.experts.weights import HeldExperts
from cluster.streams import Disconnected, connect
from model.checkpoint import open_checkpoint

STALL = 0.3
"""Seconds that a step may be held up by a server's death."""


class Traffic:
    """Random rows for layer 1, and what an expert computes for each of them alone."""

    def __init__(self, folder: Path, client: ExpertClient, dtype: str = "bfloat16", num_rows: int = 40) -> None:
        self.experts = client.layer(1)
        reference = HeldExperts(open_checkpoint(folder), getattr(torch, dtype))
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(num_rows, reference.dim, generator=generator).to(reference.dtype)
        self.chosen = torch.randint(0, 8, (num_rows,), generator=generator)
        for expert in range(8):
            reference.load((1, expert))
        rows = [reference.compute(1, [int(e)], [1], row[None]) for row, e in zip(self.x, self.chosen, strict=True)]
        self.expected = torch.cat(rows)

    def step(self) -> float:
        """Seconds of one step, whose outputs are right to the bit."""
        begun = time.perf_counter()
        out = self.experts.submit(self.x, self.chosen).wait()
        seconds = time.perf_counter() - begun
        assert torch.equal(out, self.expected)
        return seconds

    def run(self, seconds: float) -> float:
        """The longest step of so many seconds."""
        deadline, longest = time.perf_counter() + seconds, 0.0
        while time.perf_counter() < deadline:
            longest = max(longest, self.step())
        return longest


@pytest.fixture
def cluster(start_cluster):
    cluster = start_cluster(4)
    cluster.wait_for_copies(2, 30, {"s0", "s1", "s2", "s3"})
    return cluster


@pytest.fixture
def traffic(cluster, moe_folder):
    traffic = Traffic(moe_folder, cluster.client())
    traffic.run(0.2)
    return traffic


def test_servers_compute_the_same_bits_whichever_they_are(cluster, traffic):
    assert isinstance(traffic.experts.submit(traffic.x, traffic.chosen), _Exchanged) == fast_path.available()
    for _ in range(50):
        traffic.step()
    table = cluster.table()
    assert {len(copies) for experts in table.layers.values() for copies in experts} == {2}
    assert cluster.clients[0].counts.failovers.total() == 0


def test_killed(cluster, traffic):
    later = threading.Timer(0.3, cluster.kill, ["s1"])
    later.start()
    assert traffic.run(1.0) < STALL
    later.join()
    assert cluster.wait_for_copies(2, 15, {"s0", "s2", "s3"}) < 15
    assert traffic.run(0.3) < STALL
    cluster.add("s1")
    cluster.wait_for_copies(2, 30, {"s0", "s1", "s2", "s3"})
    assert traffic.run(0.3) < STALL


def test_frozen_and_thawed(cluster, traffic):
    cluster.signal("s2", signal.SIGSTOP)
    assert traffic.run(1.0) < STALL
    assert cluster.clients[0].counts.failovers.total() >= 1
    cluster.wait_for_copies(2, 15, {"s0", "s1", "s3"})
    assert traffic.run(0.3) < STALL
    cluster.signal("s2", signal.SIGCONT)
    cluster.wait_for_copies(2, 15, {"s0", "s1", "s2", "s3"})
    assert traffic.run(0.5) < STALL


def test_slow(start_cluster, moe_folder, tmp_path):
    slow = tmp_path / "slow"
    cluster = start_cluster(2)
    cluster.add("slow", slow_file=str(slow))
    traffic = Traffic(moe_folder, cluster.client())
    cluster.wait_for_copies(2, 20, {"s0", "s1", "slow"})
    traffic.run(0.5)
    slow.write_text("0.25")
    assert traffic.run(1.5) < STALL
    assert cluster.clients[0].counts.failovers.total() >= 1
    slow.unlink()
    traffic.run(1.0)
    assert max(traffic.step() for _ in range(50)) < 0.1


NO_CALL = b"MRY1" + (4).to_bytes(4, "little") + bytes(8) + b"junk" + bytes(12)
NO_TEXT = b"MRY1" + (8).to_bytes(4, "little") + bytes(8) + b"\x96\xa2\xff\xff\1\1\1\1" + bytes(8)
GARBAGE = {
    "http": b"GET / HTTP/1.1\r\n\r\n", "zeros": bytes(1000), "huge": b"MRY1" + b"\xff" * 12,
    "no-call": NO_CALL, "no-text": NO_TEXT,
}  # fmt: skip


@pytest.mark.parametrize("sent", GARBAGE.values(), ids=GARBAGE)
def test_garbage_ends_the_connection_and_nothing_else(cluster, traffic, sent):
    server = cluster.table().servers[0]
    with closing(connect(server.unix, server.key, 1.0)) as connection:
        connection._stream.sendall(sent)
        connection._stream.settimeout(5)
        with pytest.raises(Disconnected):
            connection.receive()
    assert traffic.run(0.2) < STALL
    assert cluster.servers[server.id].is_alive()


def test_without_the_key_nobody_is_served(cluster, traffic):
    for server in cluster.table().servers:
        for endpoint in (server.unix, server.tcp):
            with pytest.raises(Disconnected):
                connect(endpoint, bytes(32), 1.0)
            connect(endpoint, server.key, 1.0).close()
    assert traffic.run(0.2) < STALL


def test_killed_while_it_loads(cluster, traffic):
    cluster.add("new", load_seconds=0.3)
    deadline = time.monotonic() + 20
    while "new on" not in cluster.log("directory"):
        assert time.monotonic() < deadline
        traffic.step()
    traffic.run(1.0)
    cluster.kill("new")
    assert traffic.run(1.0) < STALL
    cluster.wait_for_copies(2, 15, {"s0", "s1", "s2", "s3"})


def test_the_directory_dies(cluster, traffic):
    cluster.directory_process.kill()
    cluster.directory_process.join(10)
    assert traffic.run(1.0) < STALL
    cluster.kill("s3")
    assert traffic.run(1.0) < STALL
    cluster.start_directory()
    cluster.wait_for_copies(2, 20, {"s0", "s1", "s2"})
    assert traffic.run(0.5) < STALL
    # Servers kept what they held: nothing was loaded twice.
    assert "loaded 16" not in cluster.log("s0")


def test_both_copies_die_the_step_waits_and_then_goes_on(start_cluster, moe_folder):
    cluster = start_cluster(2)
    traffic = Traffic(moe_folder, cluster.client())
    traffic.run(0.2)
    for name in ("s0", "s1"):
        cluster.kill(name)
    threading.Timer(1.0, cluster.add, ["s2"]).start()
    assert 1.0 < traffic.step() < 25
    assert cluster.clients[0].counts.waits >= 1
    assert traffic.run(0.3) < STALL


def test_when_no_copy_comes_back_the_error_names_the_experts(start_cluster, moe_folder):
    cluster = start_cluster(2)
    traffic = Traffic(moe_folder, cluster.client(give_up=1.0))
    for name in ("s0", "s1"):
        cluster.kill(name)
    begun = time.monotonic()
    with pytest.raises(ExpertsUnavailable, match=r"experts \[0, 1, 2.*\] of layer 1 did not answer for 1 s"):
        traffic.step()
    assert time.monotonic() - begun < 3
    with pytest.raises(ExpertsUnavailable):
        traffic.step()
    cluster.add("s2")
    cluster.wait_for_copies(1, 30, {"s2"})
    time.sleep(0.5)
    traffic.step()


def test_servers_come_and_leave(start_cluster, moe_folder):
    """2 -> 4 -> 3 without a call that had to be sent twice because its server was gone."""
    cluster = start_cluster(2)
    client = cluster.client()
    traffic = Traffic(moe_folder, client)
    for name in ("a", "b"):
        cluster.add(name)
    while len(cluster.table().servers) < 4:
        traffic.step()
    cluster.wait_for_copies(2, 20, {"s0", "s1", "a", "b"})
    traffic.run(0.5)
    cluster.servers["s0"].terminate()
    while cluster.servers["s0"].is_alive():
        traffic.step()
    cluster.wait_for_copies(2, 10, {"s1", "a", "b"})
    assert traffic.run(0.3) < STALL
    assert client.counts.failovers.total() == 0


def test_a_shift_of_load_is_followed(cluster, moe_folder):
    """All rows go to one expert: it gets more copies."""
    traffic = Traffic(moe_folder, cluster.client(), num_rows=64)
    before = [len(copies) for copies in cluster.table().layers[1]]
    experts, reference = traffic.experts, traffic.expected[:1]
    hot = int(traffic.chosen[0])
    x, chosen = traffic.x[:1].repeat(64, 1), torch.full((64,), hot)
    deadline = time.monotonic() + 25
    while time.monotonic() < deadline and len(cluster.table().layers[1][hot]) <= before[hot]:
        for _ in range(20):
            assert torch.equal(experts.submit(x, chosen).wait(), reference.expand(64, -1))
            time.sleep(0.01)
    assert len(cluster.table().layers[1][hot]) > before[hot] == 2


def test_float32(start_cluster, moe_folder):
    cluster = start_cluster(3, dtype="float32")
    client = cluster.client()
    generator = torch.Generator().manual_seed(1)
    x, chosen = torch.randn(40, 96, generator=generator), torch.randint(0, 8, (40,), generator=generator)
    reference = HeldExperts(open_checkpoint(moe_folder), torch.float32)
    rows = []
    for row, expert in zip(x, chosen.tolist(), strict=True):
        reference.load((3, expert))
        rows.append(reference.compute(3, [expert], [1], row[None]))
    torch.testing.assert_close(client.layer(3).submit(x, chosen).wait(), torch.cat(rows), rtol=1e-5, atol=1e-5)


def test_servers_sleep_when_no_step_runs(cluster, traffic):
    traffic.run(0.2)
    time.sleep(0.2)
    servers = [psutil.Process(process.pid) for process in cluster.servers.values()]
    before = [sum(server.cpu_times()[:2]) for server in servers]
    time.sleep(1.0)
    used = [sum(server.cpu_times()[:2]) - cpu for server, cpu in zip(servers, before, strict=True)]
    assert max(used) < 0.15
