"""Requests that outlive engines: fake replicas answer over real channels, die, freeze and refuse."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from cluster.channel import Outbox
from deployments.engine.request import (
    EngineRequest,
    EngineStopping,
    ExpertsGone,
    QueueFull,
    SamplingParams,
    StepFailed,
    StepMessage,
    TokenDelta,
)
from deployments.front.engine_client import EngineFailure, EngineUnavailable
from deployments.front.mailbox import Mailbox
from deployments.front.remote_engine import RemoteEngine
from deployments.front.roster import Roster

HEARTBEAT_SECONDS = 0.8
HTTP_REQUEST: ContextVar[str | None] = ContextVar("HTTP_REQUEST", default=None)


def raised(cause: Exception) -> Exception:
    """As Serve raises what a replica raised."""
    return RayTaskError("generate", "traceback", cause).as_instanceof_cause()


@dataclass
class Replica:
    """Answers token `p` of choice `i` with `100 * i + p`, from where the request says, up to `max_tokens`.

    tokens: how many of each choice it sends in one call before `then` happens: an exception, "silence" (until
    `thaw` is set; then it goes on), or None: the call returns. skipped: a token that gets lost on its way.
    once: only its first request suffers.
    """

    name: str
    tokens: int = 1000
    then: Exception | str | None = None
    skipped: int | None = None
    once: bool = False
    thaw: asyncio.Event = field(default_factory=asyncio.Event)
    requests: list[EngineRequest] = field(default_factory=list)
    cancelled: int = 0
    probes: int = 0

    async def generate(self, request: EngineRequest) -> None:
        self.requests.append(request)
        suffers = not self.once or len(self.requests) == 1
        outbox = Outbox(request.reply_to)
        outputs = request.outputs or ((),) * request.n
        begins = {index: len(known) for index, known in enumerate(outputs) if known is not None}
        try:
            for step in range(request.sampling.max_tokens):
                if suffers and step == self.tokens:
                    if self.then is None:
                        return
                    await self._strike()
                deltas = [
                    self._delta(request, index, begin + step)
                    for index, begin in begins.items()
                    if begin + step < request.sampling.max_tokens and not (suffers and begin + step == self.skipped)
                ]
                outbox.send(msgspec.msgpack.encode(StepMessage(deltas, self.name)))
                await asyncio.sleep(0.005)
        finally:
            outbox.close()

    async def _strike(self) -> None:
        await asyncio.sleep(0.05)  # what was sent arrives
        if isinstance(self.then, Exception):
            raise self.then
        if self.then == "silence":
            await self.thaw.wait()
            if isinstance(self.then, Exception):
                raise self.then

    def _delta(self, request: EngineRequest, index: int, position: int) -> TokenDelta:
        finish = "length" if position + 1 == request.sampling.max_tokens else None
        return TokenDelta(request.request_id, index, position, [100 * index + position], finish_reason=finish)

    async def check_health(self, _: None) -> None:
        self.probes += 1
        if isinstance(getattr(self.then, "cause", None), EngineStopping):
            raise self.then
        if self.then == "silence":
            await self.thaw.wait()


@dataclass
class Call:
    """A DeploymentResponse."""

    replica: Replica
    method: Callable[[Any], Any]
    request: Any

    def __await__(self) -> Any:
        return self.method(self.request).__await__()

    def cancel(self) -> None:
        self.replica.cancelled += 1


class Handle:
    """A DeploymentHandle whose router sends to the replica that `session_id` names."""

    def __init__(self, replicas: dict[str, Replica], replica: str = "", method: str = "") -> None:
        self._replicas, self._replica, self._method = replicas, replica, method

    def options(self, session_id: str, method_name: str) -> "Handle":
        return Handle(self._replicas, session_id, method_name)

    def remote(self, request: Any = None) -> Call:
        assert HTTP_REQUEST.get() is None, "calls must be made outside of the context of the front's own request"
        replica = self._replicas[self._replica]
        return Call(replica, getattr(replica, self._method), request)


@pytest.fixture
async def engines() -> AsyncIterator[Callable[..., tuple[RemoteEngine, Roster]]]:
    mailbox = Mailbox("127.0.0.1")

    def make(*replicas: Replica, limit: float = 5.0) -> tuple[RemoteEngine, Roster]:
        roster = Roster()
        roster.update(replica.name for replica in replicas)
        handle = Handle({replica.name: replica for replica in replicas})
        return RemoteEngine("tiny", handle, mailbox, roster, HEARTBEAT_SECONDS, limit), roster

    yield make
    mailbox.close()


async def take(engine: RemoteEngine, max_tokens: int = 9, n: int = 1) -> list[list[int]]:
    choices: list[list[int]] = [[] for _ in range(n)]
    HTTP_REQUEST.set("r")
    async with asyncio.timeout(10):
        async for delta in engine.generate("r", [1], SamplingParams(max_tokens=max_tokens), n):
            choices[delta.index] += delta.token_ids
    return choices


def expected(max_tokens: int = 9, n: int = 1) -> list[list[int]]:
    return [[100 * index + position for position in range(max_tokens)] for index in range(n)]


@pytest.mark.parametrize(
    "then",
    [ActorDiedError(), raised(EngineStopping("shutting down")), raised(StepFailed("a rank died")), OSError("reset")],
)
@pytest.mark.parametrize("tokens", [0, 4])
async def test_another_engine_goes_on(engines, then: Exception, tokens: int) -> None:
    first, second = Replica("a", tokens, then), Replica("b", tokens, then)
    engine, _ = engines(first, second)
    task = asyncio.create_task(take(engine, n=2))
    async with asyncio.timeout(5):
        while not (first.requests or second.requests):
            await asyncio.sleep(0)
    lost_first, other = (first, second) if first.requests else (second, first)
    other.tokens, other.then = 1000, None
    assert await task == expected(n=2)
    assert lost_first.requests[0].outputs == ()
    known = (tuple(range(tokens)), tuple(range(100, 100 + tokens)))
    assert other.requests[0].outputs == known
    assert other.requests[0].sampling == lost_first.requests[0].sampling
    assert other.requests[0].request_id != lost_first.requests[0].request_id


async def test_a_silent_engine_is_left_and_gets_nothing_until_it_answers(engines) -> None:
    frozen, other = Replica("a", 3, "silence"), Replica("b")
    engine, roster = engines(frozen)
    task = asyncio.create_task(take(engine))
    await asyncio.sleep(0.1)
    roster.update("ab")
    engine._handle._replicas["b"] = other
    assert await task == expected()
    assert roster.trusted == ["b"]
    assert frozen.cancelled == 1
    for _ in range(5):
        assert await take(engine) == expected()
    assert len(frozen.requests) == 1
    frozen.thaw.set()
    async with asyncio.timeout(5):
        while roster.trusted != ["a", "b"]:
            await asyncio.sleep(0.01)


async def test_a_silent_engine_is_waited_for_when_there_is_no_other(engines) -> None:
    slow = Replica("a", 3, "silence")
    engine, _ = engines(slow)
    task = asyncio.create_task(take(engine))
    await asyncio.sleep(2 * HEARTBEAT_SECONDS)
    assert not task.done()
    assert len(slow.requests) == 1
    slow.thaw.set()
    assert await task == expected()
    assert len(slow.requests) == 1


async def test_tokens_that_are_lost_on_their_way_are_made_again(engines) -> None:
    replica = Replica("a", skipped=4, once=True)
    engine, _ = engines(replica)
    assert await take(engine) == expected()
    assert [request.outputs for request in replica.requests] == [(), ((0, 1, 2, 3),)]


async def test_a_request_waits_for_an_engine(engines) -> None:
    replica = Replica("a")
    engine, roster = engines(replica)
    roster.update(())
    task = asyncio.create_task(take(engine))
    await asyncio.sleep(0.2)
    assert not task.done()
    roster.update("a")
    assert await task == expected()


async def test_without_an_engine_the_deadline_ends_it(engines) -> None:
    engine, roster = engines(limit=0.3)
    with pytest.raises(EngineUnavailable, match="No engine takes requests"):
        await take(engine)
    dying = Replica("a", 2, ActorDiedError())
    engine, roster = engines(dying, limit=0.3)
    task = asyncio.create_task(take(engine))
    while not dying.requests:
        await asyncio.sleep(0)
    roster.update(())
    with pytest.raises(EngineUnavailable, match=r"replica a was lost .*2 tokens had come"):
        await task


async def test_a_request_that_kills_every_engine_is_given_up(engines) -> None:
    replicas = [Replica(name, 0, ActorDiedError()) for name in "abcdef"]
    engine, _ = engines(*replicas)
    with pytest.raises(EngineFailure, match="may be at fault"):
        await take(engine)
    assert sum(len(replica.requests) for replica in replicas) <= 4


async def test_a_request_outlives_any_number_of_engines_that_stop(engines) -> None:
    stopping = [Replica(name, 0, raised(EngineStopping("shutting down"))) for name in "abcdef"]
    engine, roster = engines(*stopping)
    engine._handle._replicas["last"] = Replica("last")
    task = asyncio.create_task(take(engine))
    async with asyncio.timeout(5):
        while not all(replica.requests for replica in stopping):
            await asyncio.sleep(0.01)
    roster.update(["last"])
    assert await task == expected()


async def test_an_engine_that_serve_kills_while_it_drains_is_not_held_against_its_requests(engines) -> None:
    replicas = [Replica(str(number), 0, "silence") for number in range(5)] + [Replica("last")]
    engine, roster = engines(*replicas)
    roster.update(["0"])
    task = asyncio.create_task(take(engine))
    for replica, following in pairwise(replicas):
        async with asyncio.timeout(5):
            while not replica.requests:
                await asyncio.sleep(0.01)
        roster.update([following.name])
        await asyncio.sleep(0.25)
        replica.then = ActorDiedError()
        replica.thaw.set()
    assert await task == expected()


@pytest.mark.parametrize(("cause", "kind"), [(QueueFull(3, 1.0), QueueFull), (ValueError("broken"), EngineFailure)])
async def test_what_an_engine_refuses_is_not_tried_elsewhere(engines, cause: Exception, kind: type) -> None:
    replicas = [Replica(name, 0, raised(cause)) for name in "ab"]
    engine, _ = engines(*replicas)
    with pytest.raises(kind):
        await take(engine)
    assert sum(len(replica.requests) for replica in replicas) == 1


async def test_missing_experts_are_told_at_once_and_not_looked_for_from_another_engine(engines) -> None:
    replicas = [Replica(name, 2, raised(ExpertsGone("experts [3] of layer 1 did not answer"))) for name in "ab"]
    engine, roster = engines(*replicas)
    with pytest.raises(EngineUnavailable, match=r"experts \[3\] of layer 1 did not answer"):
        await take(engine)
    assert sum(len(replica.requests) for replica in replicas) == 1
    assert not roster.suspects


async def test_closing_cancels_the_call(engines) -> None:
    replica = Replica("a", 2, "silence")
    engine, _ = engines(replica)
    deltas = engine.generate("r", [1], SamplingParams(max_tokens=9), 1)
    async with asyncio.timeout(5):
        await anext(deltas)
        await deltas.aclose()
        await asyncio.sleep(0.01)
    assert replica.cancelled == 1


async def test_lost_last_tokens_are_noticed(engines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.front.remote_engine.LATE_TOKENS_SECONDS", 0.5)
    replica = Replica("a", 2, once=True)
    engine, _ = engines(replica)
    assert await take(engine) == expected()
    assert replica.requests[1].outputs == ((0, 1),)


async def test_a_suspect_that_lives_is_used(engines) -> None:
    replica = Replica("a")
    engine, roster = engines(replica)
    roster.suspects["a"] = "broke its connection"
    assert await take(engine) == expected()
    assert replica.probes == 1


async def test_a_long_wait_at_an_engine_is_no_reason_to_give_up_when_it_dies(engines) -> None:
    """The time in a queue once counted as time without an engine."""
    dying = Replica("a", 0, "silence", once=True)
    engine, roster = engines(dying, limit=0.5)

    async def beat() -> None:
        while True:
            engine._mailbox._heard["a"] = asyncio.get_running_loop().time()
            await asyncio.sleep(0.1)

    beating = asyncio.create_task(beat())
    task = asyncio.create_task(take(engine))
    await asyncio.sleep(1.2)
    roster.suspects["a"] = "died"
    roster.update(())
    await asyncio.sleep(0.3)
    dying.thaw.set()
    roster.update("a")
    assert await task == expected()
    beating.cancel()
