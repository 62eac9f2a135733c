"""Frames arrive whole and in order, whatever the pieces they come in; what is no frame ends the connection."""

import os
import resource
import socket
import threading
from contextlib import closing

import pytest
import torch

from cluster.streams import Connection, Disconnected, Handshake, connect, memory


@pytest.fixture
def pair():
    ends = [Connection(end) for end in socket.socketpair()]
    yield ends
    for end in ends:
        end.close()


def take(connection, count):
    """Copies of so many frames."""
    frames = []
    while len(frames) < count:
        frames += [(bytes(frame.header), bytes(frame.payload)) for frame in connection.receive()]
    return frames


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
def test_tensors_arrive_bit_by_bit(pair, dtype):
    sent = [torch.randn(rows, 7).mul(50).abs().to(dtype) for rows in (0, 1, 3, 200)]
    for number, tensor in enumerate(sent):
        pair[0].send(b"h" * number, memory(tensor))
    pair[0].send(b"empty")
    got = take(pair[1], 5)
    assert [header for header, _ in got] == [b"", b"h", b"hh", b"hhh", b"empty"]
    for (_, payload), tensor in zip(got, sent, strict=False):
        assert payload == memory(tensor)
    assert len(got[-1][1]) == 0


def test_large_frames_are_sent_as_the_other_end_takes_them(pair):
    tensors = [torch.randint(0, 256, (5_000_000,), dtype=torch.uint8) for _ in range(3)]
    for tensor in tensors:
        pair[0].send(b"large", memory(tensor))
    assert pair[0].is_sending
    frames = []
    while len(frames) < 3:
        pair[0].flush()
        frames += [bytes(frame.payload) for frame in pair[1].receive()]
    assert not pair[0].is_sending
    assert all(got == memory(sent) for got, sent in zip(frames, tensors, strict=True))


def test_frames_may_come_byte_by_byte():
    ours, theirs = socket.socketpair()
    sender, raw = socket.socketpair()
    Connection(sender).send(b"header", memory(torch.arange(10)))
    sent = raw.recv(1000)
    with closing(Connection(theirs)) as connection:
        frames = []
        for byte in sent:
            ours.send(bytes([byte]))
            frames += [(bytes(frame.header), bytes(frame.payload)) for frame in connection.receive()]
    assert frames[0][0] == b"header"
    assert frames[0][1] == memory(torch.arange(10))
    for end in (ours, sender, raw):
        end.close()


@pytest.mark.parametrize("junk", [b"GET / HTTP/1.1\r\n\r\n", bytes(100), b"MRY1" + b"\xff" * 12])
def test_what_is_no_frame_is_an_error(junk):
    ours, theirs = socket.socketpair()
    with closing(ours), closing(Connection(theirs)) as connection:
        ours.sendall(junk)
        with pytest.raises(Disconnected, match="no frame"):
            connection.receive()


def test_a_closed_end_is_noticed(pair):
    pair[0].close()
    with pytest.raises(Disconnected, match="closed"):
        pair[1].receive()
    with pytest.raises(Disconnected):
        pair[1].send(b"x", memory(torch.zeros(10)))


@pytest.mark.parametrize("key", [b"k" * 32, b"other" * 6])
def test_both_ends_must_know_the_key(key):
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        outcome = []

        def listen():
            stream, _ = listener.accept()
            with closing(stream):
                handshake = Handshake(stream, b"k" * 32)
                try:
                    while not handshake.advance():
                        pass
                    outcome.append("welcome")
                except Disconnected as error:
                    outcome.append(str(error))

        thread = threading.Thread(target=listen)
        thread.start()
        endpoint = f"tcp:127.0.0.1:{listener.getsockname()[1]}"
        if key == b"k" * 32:
            connect(endpoint, key, 5).close()
        else:
            with pytest.raises(Disconnected):
                connect(endpoint, key, 5)
        thread.join()
    assert outcome == (["welcome"] if key == b"k" * 32 else ["the other end does not know the key"])


def test_nobody_there_is_an_error_in_time():
    with pytest.raises(Disconnected, match="unix:nowhere"):
        connect("unix:nowhere", bytes(32), 0.2)
    with closing(socket.create_server(("127.0.0.1", 0))) as silent, pytest.raises(Disconnected, match="timed out"):
        connect(f"tcp:127.0.0.1:{silent.getsockname()[1]}", bytes(32), 0.2)


def test_to_have_no_descriptor_left_is_to_be_disconnected():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    first_free = os.dup(0)
    os.close(first_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (first_free, limits[1]))
    try:
        with pytest.raises(Disconnected, match="Too many open files"):
            connect("unix:moray-nobody-listens", bytes(32), 1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
