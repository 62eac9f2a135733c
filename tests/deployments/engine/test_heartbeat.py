"""The heartbeat's own thread. That beats come while a step takes long is in test_loop.py."""

import asyncio
import multiprocessing as mp
import os
import signal
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection

import pytest

from cluster.channel import Address, Inbox
from deployments.engine.heartbeat import Heartbeat
from deployments.engine.request import FrontLost


async def test_a_beat_that_fails_is_not_the_last() -> None:
    inbox, calls = Inbox("127.0.0.1"), 0

    def fronts() -> Iterable[Address]:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("dictionary changed size during iteration")
        return [inbox.address]

    heartbeat = Heartbeat("engine-1", fronts, lambda front: None)
    async with asyncio.timeout(5):
        assert await inbox.receive()
    heartbeat.stop()
    inbox.close()
    assert calls > 1


def be_a_front(connection: Connection) -> None:
    """In another process: an inbox, whose address goes to `connection`."""

    async def run() -> None:
        inbox = Inbox("127.0.0.1")
        connection.send(inbox.address)
        while True:
            await inbox.receive()

    asyncio.run(run())


@pytest.mark.parametrize(("kind", "seconds"), [(signal.SIGKILL, 2.2), (signal.SIGSTOP, 6.0)])
async def test_requests_of_a_dead_or_frozen_front_end_and_those_of_others_go_on(
    start: Callable, request_of: Callable, kind: signal.Signals, seconds: float
) -> None:
    """Killed, its connection closes; frozen, it answers no ping."""
    front = start(before=lambda _: time.sleep(0.01))
    ours, theirs = mp.get_context("spawn").Pipe()
    other = mp.get_context("spawn").Process(target=be_a_front, args=(theirs,), daemon=True)
    other.start()
    address = await asyncio.to_thread(ours.recv)
    calls = [front.engine.generate(request_of(name, [1] * 40, 2000, to=address)) for name in ("a", "b")]
    mine = asyncio.create_task(front.engine.generate(request_of("mine", [1], 2000, to=front.inbox.address)))
    theirs_end = asyncio.gather(*calls, return_exceptions=True)
    await asyncio.sleep(2.0)
    assert front.engine.status().running == 3
    assert other.pid is not None
    os.kill(other.pid, kind)
    begun = time.monotonic()
    ends = await theirs_end
    print(f"noticed {kind.name} after {time.monotonic() - begun:.2f} s")
    assert time.monotonic() - begun < seconds
    assert all(isinstance(end, FrontLost) for end in ends)
    other.kill()
    assert front.engine.status().running == 1
    assert not mine.done()
    mine.cancel()
    await front.until(lambda: front.pool.num_free == front.pool.num_blocks)
