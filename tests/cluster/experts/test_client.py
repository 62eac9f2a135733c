"""What a client takes from tables: when it is ready, which connections it keeps."""

import asyncio
import os
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from cluster.experts.client import ExpertClient, ExpertsNotReady
from cluster.experts.server import ExpertServer
from cluster.experts.table import Report, RoutingTable, ServerAddress
from cluster.experts.weights import HeldExperts
from model.checkpoint import open_checkpoint

HOST = "127.0.0.1"
NOBODY = ServerAddress("nobody", HOST, "unix:moray-nobody-listens", "tcp:127.0.0.1:1", b"")
ON_FIRST, ON_SECOND, ON_BOTH = (0,), (1,), (0, 1)


class OneTable:
    """A directory that publishes `table`."""

    def __init__(self, table: RoutingTable) -> None:
        self.table = table

    async def report(self, report: Report) -> None:
        raise NotImplementedError

    async def next_table(self, epoch: int) -> RoutingTable | None:
        for _ in range(100):
            if self.table.epoch != epoch:
                return self.table
            await asyncio.sleep(0.02)
        return None


@pytest.fixture
def server(moe_folder) -> Iterator[ExpertServer]:
    held = HeldExperts(open_checkpoint(moe_folder), torch.float32)
    held.load((1, 0))
    server = ExpertServer(held, HOST)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def client_of() -> Iterator[Callable[[OneTable], ExpertClient]]:
    clients: list[ExpertClient] = []

    def start(directory: OneTable) -> ExpertClient:
        clients.append(ExpertClient(directory, HOST))
        clients[-1].start()
        return clients[-1]

    yield start
    for client in clients:
        client.close()


def test_ready_when_every_expert_has_a_copy_that_answers(server, client_of):
    table = RoutingTable(1, (server.address, NOBODY), {1: (ON_FIRST, ON_BOTH)})
    client_of(OneTable(table)).wait_until_ready(5)


def test_not_ready_while_an_expert_has_none(server, client_of):
    table = RoutingTable(1, (server.address, NOBODY), {1: (ON_FIRST, ON_SECOND)})
    with pytest.raises(ExpertsNotReady, match="1 experts are only on servers that do not answer: nobody"):
        client_of(OneTable(table)).wait_until_ready(2)


def test_a_server_that_is_dropped_in_mid_call_is_disconnected_after_it(server, client_of):
    directory = OneTable(RoutingTable(1, (server.address,), {1: (ON_FIRST,)}))
    client = client_of(directory)
    client.wait_until_ready(5)
    pending = client.layer(1).submit(torch.ones(2, 96), torch.zeros(2, dtype=torch.int64))
    directory.table = RoutingTable(2, (NOBODY,), {1: (ON_FIRST,)})
    deadline = time.monotonic() + 5
    while client.table.epoch < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
        client._peers.adopt()
    assert len(client._peers._by_fd) == 1
    assert pending.wait().shape == (2, 96)
    assert not client._peers._by_fd


def test_closing_leaves_no_descriptor(server, client_of):
    before = len(os.listdir("/proc/self/fd"))
    client = client_of(OneTable(RoutingTable(1, (server.address,), {1: (ON_FIRST,)})))
    client.wait_until_ready(5)
    client.close()
    client.close()
    deadline = time.monotonic() + 5
    while len(os.listdir("/proc/self/fd")) > before and time.monotonic() < deadline:
        time.sleep(0.05)  # the server's end
    assert len(os.listdir("/proc/self/fd")) == before
