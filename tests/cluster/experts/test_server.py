"""A server and clients that do not behave: the thread that computes is there for all others."""

import os
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch

from cluster.experts.messages import Call
from cluster.experts.server import DEAF_SECONDS, HANDSHAKE_SECONDS, MAX_UNPROVED, ExpertServer
from cluster.experts.weights import HeldExperts
from cluster.streams import KEY_BYTES, connect, memory
from model.checkpoint import open_checkpoint


@pytest.fixture
def server(moe_folder) -> Iterator[ExpertServer]:
    server = ExpertServer(HeldExperts(open_checkpoint(moe_folder), torch.bfloat16), "127.0.0.1")
    server.start()
    yield server
    server.stop()


def silent(server: ExpertServer) -> socket.socket:
    """A client that has been greeted and says nothing."""
    stream = socket.socket(socket.AF_UNIX)
    stream.settimeout(HANDSHAKE_SECONDS + 3)
    stream.connect("\0" + server.address.unix.removeprefix("unix:"))
    assert len(stream.recv(KEY_BYTES)) == KEY_BYTES
    return stream


def test_a_client_that_does_not_prove_itself_is_hung_up(server):
    begun = time.monotonic()
    with silent(server) as stream:
        connection = connect(server.address.unix, server.address.key, 1.0)
        assert stream.recv(1) == b""
    assert HANDSHAKE_SECONDS - 0.5 < time.monotonic() - begun < HANDSHAKE_SECONDS + 2
    assert len(server._clients) == 1
    connection.close()


def test_unproved_clients_are_few(server):
    with ExitStack() as stack:
        streams = [stack.enter_context(silent(server)) for _ in range(MAX_UNPROVED + 3)]
        assert len(server._clients) == MAX_UNPROVED
        streams[0].settimeout(0.5)
        assert streams[0].recv(1) == b""


def test_without_descriptors_it_waits_and_then_listens_again(server):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket(socket.AF_UNIX) as stream:
        first_free = os.dup(0)
        os.close(first_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (first_free, limits[1]))
        try:
            stream.connect("\0" + server.address.unix.removeprefix("unix:"))
            time.sleep(0.1)
            before = time.process_time()
            time.sleep(DEAF_SECONDS / 2)
            assert time.process_time() - before < DEAF_SECONDS / 10
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        connect(server.address.unix, server.address.key, DEAF_SECONDS + 2).close()


class Gated(HeldExperts):
    """Computes once each time that it is let."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.begun, self.gate = threading.Semaphore(0), threading.Semaphore(0)

    def compute(self, *arguments) -> torch.Tensor:
        self.begun.release()
        assert self.gate.acquire(timeout=10)
        return super().compute(*arguments)


def test_who_waits_is_counted_until_it_is_served(moe_folder):
    experts = Gated(open_checkpoint(moe_folder), torch.float32)
    experts.load((1, 0))
    server = ExpertServer(experts, "127.0.0.1")
    server.start()
    clients = [connect(server.address.unix, server.address.key, 2.0) for _ in range(4)]
    call, row = Call(1, 1, "float32", [0], [1]).encode(), memory(torch.zeros(1, experts.dim))
    clients[0].send(call, row)
    assert experts.begun.acquire(timeout=10)
    for client in clients[1:]:  # together, as the server sees it
        client.send(call, row)
    for waiting in (2, 1, 0):
        experts.gate.release()
        assert experts.begun.acquire(timeout=10)
        assert server.waiting == waiting
    experts.gate.release()
    deadline = time.monotonic() + 10
    while server.calls < 4:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert server.waiting == 0
    for client in clients:
        client.close()
    server.stop()
