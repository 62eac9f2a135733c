"""A server and clients that do not behave: the thread that computes is there for all others."""

import os
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch

from cluster.experts.server import DEAF_SECONDS, HANDSHAKE_SECONDS, MAX_UNPROVED, ExpertServer
from cluster.experts.weights import HeldExperts
from cluster.streams import KEY_BYTES, connect
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
