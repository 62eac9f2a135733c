"""Deltas from real channels to their requests, and the calls that carry them."""

import asyncio
from typing import Any

import msgspec
import pytest

from cluster.channel import Outbox
from deployments.engine.request import QueueFull, SamplingParams, StepMessage, TokenDelta
from deployments.front.engine_client import EngineFailure, EngineUnavailable
from deployments.front.mailbox import Mailbox
from deployments.front.remote_engine import RemoteEngine


def delta(request_id: str, offset: int, finish: str | None = None) -> TokenDelta:
    return TokenDelta(request_id, 0, offset, [offset], finish_reason=finish)


@pytest.fixture
async def mailbox():
    box = Mailbox("127.0.0.1")
    yield box
    box.close()


class FakeHandle:
    """A Serve handle whose engine answers through the channel; `outcome` is what its call returns or raises."""

    def __init__(self, deltas: int, outcome: Exception | None = None, hangs: bool = False) -> None:
        self.generate = self.describe = self
        self.cancelled = self.ended = False
        self._deltas = deltas
        self._outcome = outcome
        self._hangs = hangs

    def remote(self, request: Any = None) -> "FakeHandle":
        self._request = request
        return self

    def __await__(self):
        return self._run().__await__()

    async def _run(self) -> None:
        outbox = Outbox(self._request.reply_to)
        for offset in range(self._deltas):
            finish = "length" if offset + 1 == self._request.sampling.max_tokens else None
            step = StepMessage([delta("stranger", 0), delta(self._request.request_id, offset, finish)])
            outbox.send(msgspec.msgpack.encode(step))
        try:
            await asyncio.sleep(100 if self._hangs else 0.05)
        finally:
            outbox.close()
        self.ended = True
        if self._outcome is not None:
            raise self._outcome

    def cancel(self) -> None:
        self.cancelled = True


async def take(engine: RemoteEngine, max_tokens: int) -> list[int]:
    deltas = engine.generate("r", [1], SamplingParams(max_tokens=max_tokens), 1)
    return [token async for delta in deltas for token in delta.token_ids]


async def test_deltas_arrive_in_order_and_the_call_ends_by_itself(mailbox):
    handle = FakeHandle(5)
    assert await asyncio.wait_for(take(RemoteEngine("tiny", handle, mailbox), 5), 5) == [0, 1, 2, 3, 4]
    await asyncio.sleep(0.2)
    assert handle.ended
    assert not handle.cancelled


async def test_closing_cancels_the_call(mailbox):
    handle = FakeHandle(2, hangs=True)
    deltas = RemoteEngine("tiny", handle, mailbox).generate("r", [1], SamplingParams(max_tokens=9), 1)
    async with asyncio.timeout(5):
        await anext(deltas)
        await deltas.aclose()
        await asyncio.sleep(0.01)
    assert handle.cancelled


@pytest.mark.parametrize(("outcome", "kind"), [(QueueFull(3, 1.0), QueueFull), (ValueError("broken"), EngineFailure)])
async def test_what_the_call_raises_reaches_the_reader(mailbox, outcome, kind):
    with pytest.raises(kind):
        await asyncio.wait_for(take(RemoteEngine("tiny", FakeHandle(1, outcome), mailbox), 5), 5)


async def test_a_dead_engine_is_unavailable(mailbox):
    from ray.exceptions import ActorDiedError

    with pytest.raises(EngineUnavailable):
        await asyncio.wait_for(take(RemoteEngine("tiny", FakeHandle(1, ActorDiedError()), mailbox), 5), 5)


async def test_lost_tokens_are_noticed(mailbox, monkeypatch):
    monkeypatch.setattr("deployments.front.remote_engine.LATE_TOKENS_SECONDS", 0.05)
    with pytest.raises(EngineFailure, match="lost"):
        await asyncio.wait_for(take(RemoteEngine("tiny", FakeHandle(2), mailbox), 5), 5)
