"""Deltas from real channels to their requests."""

import asyncio

import msgspec
import pytest

from cluster.channel import Outbox
from deployments.engine.request import StepMessage, TokenDelta
from deployments.front.mailbox import Mailbox


def delta(request_id: str, offset: int) -> TokenDelta:
    return TokenDelta(request_id, 0, offset, [offset])


@pytest.fixture
async def mailbox():
    box = Mailbox("127.0.0.1")
    yield box
    box.close()


async def test_each_request_gets_its_own_deltas_and_strangers_are_dropped(mailbox):
    outbox = Outbox(mailbox.address)
    with mailbox.open("a") as a, mailbox.open("b") as b:
        deltas = [delta("a", 0), delta("stranger", 0), delta("b", 0), delta("a", 1)]
        outbox.send(msgspec.msgpack.encode(StepMessage(deltas)))
        async with asyncio.timeout(5):
            assert [(await a.get()).offset, (await a.get()).offset, (await b.get()).offset] == [0, 1, 0]
    outbox.close()


INVALID_UTF8 = b"\x92\x90\xa1\xff"
"""[[], "\\xff"]: msgspec raises UnicodeDecodeError, which is no MsgspecError."""


@pytest.mark.parametrize("malformed", [b"", b"\xc1", b"\x92\x90\x01", INVALID_UTF8])
async def test_a_malformed_message_is_skipped(mailbox, malformed: bytes):
    outbox = Outbox(mailbox.address)
    with mailbox.open("a") as a:
        outbox.send(malformed)
        outbox.send(msgspec.msgpack.encode(StepMessage([delta("a", 0)])))
        async with asyncio.timeout(5):
            assert (await a.get()).offset == 0
    outbox.close()


async def test_an_error_comes_after_the_deltas_before_it(mailbox):
    with mailbox.open("a") as deltas:
        deltas.put(delta("a", 0))
        deltas.fail(RuntimeError("over"))
        assert (await deltas.get()).offset == 0
        with pytest.raises(RuntimeError, match="over"):
            await deltas.get()


async def test_empty_messages_tell_that_an_engine_lives(mailbox):
    outbox = Outbox(mailbox.address)
    assert mailbox.heard("engine-1") == 0
    outbox.send(msgspec.msgpack.encode(StepMessage([], "engine-1")))
    async with asyncio.timeout(5):
        while not mailbox.heard("engine-1"):
            await asyncio.sleep(0.01)
    outbox.close()
