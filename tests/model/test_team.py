"""The kernels' threads: the same bits however many there are, whoever else calls, and whether they may run at all."""

import multiprocessing
import threading
import time
from collections.abc import Iterator

import psutil
import pytest
import torch

from model.kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.available(), reason="no AVX512-BF16 or no compiler")


@pytest.fixture(autouse=True)
def threads_of_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    cpu.park(False)
    cpu.set_num_threads(before)


class Work:
    """A product that is worth several threads, and what one thread makes of it."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.linear = cpu.PackedLinear(torch.randn(1024, 512, generator=generator).bfloat16())
        self.x = torch.randn(9, 512, generator=generator).bfloat16()
        cpu.set_num_threads(1)
        self.expected = self.linear(self.x)

    def repeat(self, times: int) -> None:
        for _ in range(times):
            assert torch.equal(self.linear(self.x), self.expected)


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    work = Work()
    for threads in (2, 3, 7, 1, 4):  # most have no CPU to themselves
        cpu.set_num_threads(threads)
        work.repeat(200)


def test_a_loop_after_a_pause_wakes_the_others() -> None:
    work = Work()
    cpu.set_num_threads(3)
    for pause in (0.0, 0.0001, 0.0003, 0.001, 0.01) * 20:
        time.sleep(pause)
        work.repeat(2)


def test_callers_at_the_same_time() -> None:
    work, failures = Work(), []

    def call() -> None:
        try:
            work.repeat(500)
        except AssertionError as error:
            failures.append(error)

    cpu.set_num_threads(3)
    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    while any(caller.is_alive() for caller in callers):
        cpu.park(True)
        cpu.park(False)
    assert not failures


def test_while_parked_only_the_caller_computes() -> None:
    work, process = Work(), psutil.Process()
    cpu.set_num_threads(3)
    work.repeat(10)
    cpu.park(True)
    time.sleep(0.01)
    before = {thread.id: thread.user_time + thread.system_time for thread in process.threads()}
    begun = time.perf_counter()
    while time.perf_counter() - begun < 0.3:
        work.repeat(10)
    used = [thread.user_time + thread.system_time - before.get(thread.id, 0.0) for thread in process.threads()]
    assert sum(seconds > 0.05 for seconds in used) == 1


def _compute_in_child(work: Work) -> None:
    work.repeat(50)


def test_a_forked_process_computes_without_its_parents_threads() -> None:
    work = Work()
    cpu.set_num_threads(3)
    work.repeat(10)
    child = multiprocessing.get_context("fork").Process(target=_compute_in_child, args=(work,))
    child.start()
    child.join(30)
    assert child.exitcode == 0
