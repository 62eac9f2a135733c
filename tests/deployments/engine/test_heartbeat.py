"""The heartbeat's own thread. That beats come while a step takes long is in test_loop.py."""

import asyncio
from collections.abc import Iterable

from cluster.channel import Address, Inbox
from deployments.engine.heartbeat import Heartbeat


async def test_a_beat_that_fails_is_not_the_last() -> None:
    inbox, calls = Inbox("127.0.0.1"), 0

    def fronts() -> Iterable[Address]:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("dictionary changed size during iteration")
        return [inbox.address]

    heartbeat = Heartbeat("engine-1", fronts)
    async with asyncio.timeout(5):
        assert await inbox.receive()
    heartbeat.stop()
    inbox.close()
    assert calls > 1
