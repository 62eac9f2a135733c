"""Messages arrive, in order, and only from those who know the inbox."""

import asyncio
import threading
from dataclasses import replace

import pytest
import zmq

from cluster.channel import Inbox, Outbox


@pytest.fixture
async def inbox():
    inbox = Inbox("127.0.0.1")
    yield inbox
    inbox.close()


async def test_messages_arrive_in_order_from_several_threads(inbox: Inbox) -> None:
    def send(sender: int) -> None:
        outbox = Outbox(inbox.address)
        for number in range(2000):
            outbox.send(b"%d %d" % (sender, number))
        outbox.close()

    threads = [threading.Thread(target=send, args=(sender,)) for sender in range(3)]
    for thread in threads:
        thread.start()
    received: list[list[int]] = [[], [], []]
    async with asyncio.timeout(20):
        for _ in range(6000):
            sender, number = map(int, (await inbox.receive()).split())
            received[sender].append(number)
    for thread in threads:
        thread.join()
    assert received == [list(range(2000))] * 3


async def test_any_bytes_survive(inbox: Inbox) -> None:
    outbox = Outbox(inbox.address)
    for message in (b"", bytes(range(256)), b"x" * 5_000_000):
        outbox.send(message)
        async with asyncio.timeout(10):
            assert await inbox.receive() == message
    outbox.close()


async def test_a_sender_with_another_key_is_not_heard(inbox: Inbox) -> None:
    wrong_key, _ = zmq.curve_keypair()
    stranger = Outbox(replace(inbox.address, public_key=wrong_key))
    stranger.send(b"let me in")
    plain = zmq.Context.instance().socket(zmq.PUSH)
    plain.linger = 0
    plain.connect(inbox.address.endpoint)
    plain.send(b"me too")
    friend = Outbox(inbox.address)
    await asyncio.sleep(0.5)
    friend.send(b"hello")
    async with asyncio.timeout(10):
        assert await inbox.receive() == b"hello"
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await inbox.receive()
    for sender in (stranger, plain, friend):
        sender.close()


async def test_sending_waits_for_nobody(inbox: Inbox) -> None:
    """A front that hangs must not stop the engine's step thread."""
    outbox = Outbox(inbox.address)
    for _ in range(20000):
        outbox.send(b"token" * 20)
    outbox.close()


def test_every_inbox_has_its_own_name_and_key() -> None:
    first, second = Inbox("127.0.0.1"), Inbox("127.0.0.1")
    assert first.address.name != second.address.name
    assert first.address.public_key != second.address.public_key
    first.close()
    second.close()
