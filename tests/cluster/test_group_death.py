"""A group lives and dies as one: whichever of its processes is killed or frozen, busy or idle, all end soon."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.parallel import Layout, Rendezvous, World
from cluster.shard_group import ShardGroup, follow
from cluster.shared_memory import available
from tests.cluster.ranks import Ranks
from tests.cluster.test_shard_group import greedy, options, save_model

pytestmark = pytest.mark.skipif(not available(), reason="needs a C++ compiler")

RANKS = 3
TIMEOUT_S = 1.0
LOST = 3
"""Exit code of a leader that was told."""


def run_rank(rank: int, layout: Layout, address: str, case: dict[str, Any], folder: str, busy: bool) -> None:
    world = World(layout, rank, address, start_seconds=60)
    if rank:
        follow(world, case, TIMEOUT_S)
        return
    group = ShardGroup(world, TIMEOUT_S, lambda reason: (Path(f"{folder}/reason").write_text(reason), os._exit(LOST)))
    group.load(case)
    Path(f"{folder}/ready").touch()
    while True:
        if busy:
            greedy(group, [[1, 2, 3]] * 4, 4)
        else:
            time.sleep(1)


@pytest.fixture
def start(tmp_path: Path):
    """Starts a group; returns when it works."""
    started = []

    def _start(busy: bool, hosts: tuple[str, ...] = ("here",) * RANKS) -> Ranks:
        case = options(
            save_model(tmp_path / "model", n_heads=6, n_kv_heads=3, head_dim=16, ffn_hidden_dim=96), "float32"
        )
        rendezvous = Rendezvous()
        layout = Layout(RANKS, 1, hosts)
        ranks = Ranks(range(RANKS), run_rank, layout, rendezvous.address, case, str(tmp_path), busy)
        started.append(ranks)
        deadline = time.monotonic() + 100
        while not (tmp_path / "ready").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        rendezvous.close()
        time.sleep(0.3)
        return ranks

    yield _start
    for ranks in started:
        ranks.kill()


def seconds_until_all_end(ranks: Ranks, limit: float) -> float:
    begun = time.monotonic()
    for process in ranks.processes:
        process.join(max(0.0, limit - (time.monotonic() - begun)))
        assert process.exitcode is not None, f"{process} lives on"
    return time.monotonic() - begun


@pytest.mark.parametrize("busy", [True, False], ids=["busy", "idle"])
@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank_takes_all_with_it_within_two_seconds(start, tmp_path: Path, victim: int, busy: bool) -> None:
    before = set(os.listdir("/dev/shm"))
    ranks = start(busy)
    os.kill(ranks.processes[victim].pid, signal.SIGKILL)
    seconds = seconds_until_all_end(ranks, limit=2)
    print(f"group of {RANKS} gone {seconds:.3f} s after kill -9 of rank {victim}")
    assert set(os.listdir("/dev/shm")) <= before
    if victim:
        assert ranks.processes[0].exitcode == LOST
        assert f"rank {victim} (pid {ranks.processes[victim].pid}) has died" in (tmp_path / "reason").read_text()


@pytest.mark.parametrize("busy", [True, False], ids=["busy", "idle"])
@pytest.mark.parametrize("victim", [1])
def test_a_frozen_rank_is_ended_after_its_time(start, tmp_path: Path, victim: int, busy: bool) -> None:
    ranks = start(busy)
    os.kill(ranks.processes[victim].pid, signal.SIGSTOP)
    seconds_until_all_end(ranks, limit=2 * TIMEOUT_S + 2)
    assert (tmp_path / "reason").read_text()


def test_followers_of_a_frozen_leader_end(start) -> None:
    ranks = start(False)
    os.kill(ranks.processes[0].pid, signal.SIGSTOP)
    begun = time.monotonic()
    for process in ranks.processes[1:]:
        process.join(5)
        assert process.exitcode == 1
    assert time.monotonic() - begun >= TIMEOUT_S


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("busy", [True, False], ids=["busy", "idle"])
def test_a_rank_of_another_host_is_missed(start, number: int, busy: bool) -> None:
    """Where no process can be watched, gloo's broken connection tells, or its deadline."""
    ranks = start(busy, hosts=("one", "one", "other"))
    os.kill(ranks.processes[2].pid, number)
    begun = time.monotonic()
    for process in ranks.processes[:2]:
        process.join(6)
        assert process.exitcode
    assert ranks.processes[0].exitcode == LOST
    print(f"leader and follower gone {time.monotonic() - begun:.2f} s after signal {number} to a rank of another host")


def slow_loader(rank: int, layout: Layout, address: str, case: dict[str, Any], folder: str) -> str:
    """Rank 1 never gets to load: its parent kills it."""
    world = World(layout, rank, address, start_seconds=60)
    if rank:
        Path(f"{folder}/ready").touch()
        time.sleep(100)
    group = ShardGroup(world, TIMEOUT_S, lambda reason: os._exit(LOST))
    try:
        group.load(case)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"


def test_a_rank_that_dies_while_loading_fails_the_leaders_load(tmp_path: Path) -> None:
    rendezvous = Rendezvous()
    case = options(save_model(tmp_path / "model"), "float32")
    ranks = Ranks([0, 1], slow_loader, Layout(2, 1, ("here",) * 2), rendezvous.address, case, str(tmp_path))
    try:
        while not (tmp_path / "ready").exists():
            time.sleep(0.05)
        pid = ranks.processes[1].pid
        os.kill(pid, signal.SIGKILL)
        assert ranks.result(0) == f"RankLost: rank 1 (pid {pid}) has died"
    finally:
        ranks.kill()
        rendezvous.close()
