"""Collectives over shared memory, on real processes."""

import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding

from cluster import process_group
from cluster.shared_memory import RankLost, Segment, SharedMemory, available
from model.parallel import initialize_model_parallel
from tests.cluster.ranks import Ranks, on_ranks

pytestmark = pytest.mark.skipif(not available(), reason="needs a C++ compiler")

COUNTS = [1, 7, 576, 1025, 300_000, 700_001]
"""The last two are longer than a slot."""


def numbers(rank: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(1000 * rank + count % 997)).to(dtype)


def reductions(rank: int, path: str, size: int) -> list[torch.Tensor]:
    group = SharedMemory(path, rank, size)
    dtypes = (torch.float32, torch.bfloat16)
    return [group.all_reduce(numbers(rank, count, dtype)) for count in COUNTS for dtype in dtypes]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_all_reduce_sums_by_rank_and_rounds_once(size: int) -> None:
    segment = Segment(size)
    got = on_ranks(size, reductions, segment.path, size)
    segment.close()
    for rank in range(1, size):
        assert all(torch.equal(a, b) for a, b in zip(got[0], got[rank], strict=True))
    expected = []
    for count in COUNTS:
        for dtype in (torch.float32, torch.bfloat16):
            total = torch.zeros(count)
            for rank in range(size):
                total = numbers(rank, count, dtype).float() + total
            expected.append(total.to(dtype))
    assert all(torch.equal(a, b) for a, b in zip(got[0], expected, strict=True))


NOT_FINITE = [[torch.nan, torch.inf, -torch.inf, 3e38], [1.0, -torch.inf, -torch.inf, 3e38]]


def special(rank: int, path: str) -> torch.Tensor:
    return SharedMemory(path, rank, 2).all_reduce(torch.tensor(NOT_FINITE[rank]).bfloat16())


def test_what_is_not_finite_stays_so() -> None:
    segment = Segment(2)
    got, _ = on_ranks(2, special, segment.path)
    segment.close()
    expected = torch.tensor([torch.nan, torch.nan, -torch.inf, torch.inf]).bfloat16()
    torch.testing.assert_close(got, expected, equal_nan=True)


def moves(rank: int, path: str, size: int) -> list[torch.Tensor | None]:
    group = SharedMemory(path, rank, size)
    wide = torch.arange(3 * 200_000, dtype=torch.int64).view(3, -1) * 10 + rank
    narrow = torch.arange(1000 * 6, dtype=torch.int16).view(1000, 6) * 2 + rank
    return [
        group.broadcast(torch.full((400_000,), rank), root=1),
        group.broadcast(torch.full((9,), rank, dtype=torch.uint8), root=0, readers=1 << 2),
        group.gather(wide),
        group.gather(narrow, readers=1),
        group.gather(torch.empty(0, 4)),
    ]


def test_broadcast_and_gather() -> None:
    segment = Segment(3)
    got = on_ranks(3, moves, segment.path, 3)
    segment.close()
    assert all((whole == 1).all() for whole, *_ in got)
    assert [int(part[0]) for _, part, *_ in got] == [0, 1, 0]
    wide = torch.cat([torch.arange(3 * 200_000).view(3, -1) * 10 + rank for rank in range(3)], dim=1)
    assert all(torch.equal(whole, wide) for _, _, whole, *_ in got)
    narrow = [torch.arange(6000, dtype=torch.int16).view(1000, 6) * 2 + rank for rank in range(3)]
    assert torch.equal(got[0][3], torch.cat(narrow, dim=1))
    assert got[1][3] is got[2][3] is None
    assert got[0][4].shape == (0, 12)


def race(rank: int, path: str, size: int) -> int:
    """Ranks that are late at random, and often sleep: does anyone read what is not there yet, or lose a wake-up?"""
    group = SharedMemory(path, rank, size, spin_ns=0 if rank else 1000)
    delays = torch.rand(400, generator=torch.Generator().manual_seed(rank)) * 0.002
    for number, delay in enumerate(delays.tolist()):
        if number % 3 == rank:
            time.sleep(delay)
        x = torch.full((1 + number * 37 % 5000,), float(number + rank))
        assert (group.all_reduce(x) == size * number + size * (size - 1) / 2).all()
    return 400


def test_ranks_that_are_late_at_random() -> None:
    segment = Segment(3)
    assert on_ranks(3, race, segment.path, 3) == [400] * 3
    segment.close()


def idle(rank: int, path: str) -> float:
    group = SharedMemory(path, rank, 2)
    if rank == 0:
        time.sleep(1.5)
    before = time.process_time()
    group.barrier()
    return time.process_time() - before


def test_waiting_long_costs_nothing() -> None:
    segment = Segment(2)
    _, cpu_seconds = on_ranks(2, idle, segment.path)
    segment.close()
    assert cpu_seconds < 0.1


def test_a_rank_that_does_not_come_is_named() -> None:
    segment = Segment(2)
    group = SharedMemory(segment.path, 0, 2)
    segment.close()
    group.set_deadline(0.2)
    begun = time.monotonic()
    with pytest.raises(RankLost, match="rank 1 of 2 did not answer"):
        group.all_reduce(torch.ones(4))
    assert 0.2 <= time.monotonic() - begun < 1


def late(rank: int, path: str, patience: float) -> float:
    """Seconds that rank 0 waited for rank 1, which is late by five deadlines."""
    group = SharedMemory(path, rank, 2)
    group.barrier()
    group.set_deadline(0.4, patience)
    if rank:
        time.sleep(2)
    begun = time.monotonic()
    try:
        group.barrier()
    except RankLost:
        return -1
    return time.monotonic() - begun


def test_a_rank_that_computes_for_long_is_waited_for() -> None:
    segment = Segment(2)
    seconds, _ = on_ranks(2, late, segment.path, 30)
    segment.close()
    assert seconds > 1.5


def test_a_rank_that_lives_but_does_not_come_is_given_up() -> None:
    segment = Segment(2)
    assert on_ranks(2, late, segment.path, 3)[0] == -1
    segment.close()


def freeze(rank: int, path: str) -> float:
    group = SharedMemory(path, rank, 2)
    group.barrier()
    group.set_deadline(0.5)
    if rank:
        os.kill(os.getpid(), signal.SIGSTOP)
    begun = time.monotonic()
    with pytest.raises(RankLost, match="rank 1 of 2 did not answer"):
        group.barrier()
    return time.monotonic() - begun


def test_a_frozen_rank_gives_no_sign_of_life() -> None:
    segment = Segment(2)
    ranks = Ranks([0, 1], freeze, segment.path)
    assert 0.5 <= ranks.result(0) < 3
    ranks.kill()
    segment.close()


def test_abort_ends_a_wait_at_once() -> None:
    segment = Segment(2)
    group = SharedMemory(segment.path, 0, 2)
    segment.close()
    begun = time.monotonic()
    threading.Timer(0.2, group.abort).start()
    with pytest.raises(RankLost, match="aborted"):
        group.barrier()
    assert time.monotonic() - begun < 0.5
    with pytest.raises(RankLost, match="aborted"):
        group.barrier()


def test_the_memory_has_no_name_to_leak() -> None:
    before = set(os.listdir("/dev/shm"))
    segment = Segment(2)
    group = SharedMemory(segment.path, 0, 2)
    assert set(os.listdir("/dev/shm")) == before
    segment.close()
    group.close()
    with pytest.raises(OSError, match="No such file"):
        SharedMemory(segment.path, 1, 2)


def test_arguments_are_checked() -> None:
    segment = Segment(1)
    group = SharedMemory(segment.path, 0, 1)
    segment.close()
    with pytest.raises(TypeError, match=r"cannot sum torch\.int64"):
        group.all_reduce(torch.ones(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="contiguous"):
        group.all_reduce(torch.ones(4, 4).T)
    with pytest.raises(ValueError, match="at most 64"):
        Segment(65)


def fairscale_layers(rank: int, path: str) -> list[torch.Tensor]:
    """Over the backend: fairscale's own layers with their gradients, and plain collectives."""
    process_group.register()
    dist.init_process_group("shm", store=dist.FileStore(path, 2), rank=rank, world_size=2)
    initialize_model_parallel(2, model_parallel_backend="shm", pipeline_backend="shm", ddp_backend="shm")
    assert isinstance(initialize.get_model_parallel_group(), process_group.SharedMemoryGroup)
    torch.manual_seed(0)
    embedding = VocabParallelEmbedding(10, 8, init_method=torch.nn.init.normal_)
    wide = ColumnParallelLinear(8, 16, gather_output=False, init_method=torch.nn.init.normal_)
    narrow = RowParallelLinear(16, 8, input_is_parallel=True, init_method=torch.nn.init.normal_)
    out = narrow(torch.relu(wide(embedding(torch.arange(10)))))
    out.square().sum().backward()
    least, most, whole = torch.tensor(rank + 3), torch.tensor([1.5 - rank]).double(), torch.tensor([rank])
    dist.all_reduce(least, dist.ReduceOp.MIN)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    dist.all_reduce(whole)
    gathered = [torch.empty(2, dtype=torch.float64) for _ in range(2)]
    dist.all_gather(gathered, torch.full((2,), float(rank), dtype=torch.float64))
    source = torch.full((3, 2), rank).T
    dist.broadcast(source, 1)
    dist.barrier()
    return [out.detach(), narrow.weight.grad, least, most, whole, *gathered, source]


def test_fairscale_runs_over_it(tmp_path) -> None:
    first, second = on_ranks(2, fairscale_layers, str(tmp_path / "store"))
    assert torch.equal(first[0], second[0])
    torch.manual_seed(0)
    weights = [torch.empty(shape).normal_() for shape in ((10, 8), (16, 8), (8, 16))]
    weights[2].requires_grad_()
    expected = torch.relu(weights[0] @ weights[1].T) @ weights[2].T
    expected.square().sum().backward()
    torch.testing.assert_close(first[0], expected.detach(), rtol=1e-4, atol=1e-4)
    grad = torch.cat([first[1], second[1]], dim=1)
    torch.testing.assert_close(grad, weights[2].grad, rtol=1e-4, atol=1e-3)
    for values in (first, second):
        assert [int(values[2]), float(values[3]), int(values[4])] == [3, 1.5, 1]
        assert values[5].tolist() == [0, 0]
        assert values[6].tolist() == [1, 1]
        assert (values[7] == 1).all()


def die(rank: int, path: str) -> None:
    group = SharedMemory(path, rank, 2)
    if rank:
        os._exit(9)
    group.set_deadline(1)
    with pytest.raises(RankLost):
        group.barrier()


def test_a_dead_rank_is_a_missed_deadline() -> None:
    segment = Segment(2)
    ranks = Ranks([0, 1], die, segment.path)
    ranks.processes[1].join(60)
    ranks.processes[0].join(60)
    segment.close()
    assert [process.exitcode for process in ranks.processes] == [0, 9]
