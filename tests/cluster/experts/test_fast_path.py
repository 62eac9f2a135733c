"""The fast path deals, sends and answers as Python does, and leaves it what is not as usual."""

import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.experts import fast_path
from cluster.experts.client import ExpertClient, _Exchanged
from cluster.experts.fast_path import CAPACITY, MAX_ROWS, Answering, Exchange, Lines, Part
from cluster.experts.latency import LatencyCounts
from cluster.experts.messages import Call, Refusal, Reply, decode_answer, decode_call
from cluster.experts.routes import Balance
from cluster.experts.server import ExpertServer
from cluster.experts.table import RoutingTable, ServerAddress
from cluster.experts.weights import HeldExperts
from cluster.streams import Connection, Disconnected, Frame, connect, frame_head, memory
from model.checkpoint import open_checkpoint
from tests.cluster.experts.test_client import OneTable

pytestmark = pytest.mark.skipif(not fast_path.available(), reason="needs a C++ compiler")

servers_of_experts = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True), min_size=4, max_size=4)
steps = st.lists(st.lists(st.integers(0, 3), max_size=MAX_ROWS), min_size=1, max_size=70)


class Pair:
    """Lines to two servers, whose ends the test holds."""

    def __init__(self) -> None:
        ends = [socket.socketpair() for _ in range(2)]
        self.clients = [Connection(client) for client, _ in ends]
        self.servers = [Connection(server) for _, server in ends]
        self.sockets = [server for _, server in ends]
        self.latency = [LatencyCounts(), LatencyCounts()]
        self.lines, self.exchange = Lines(self.clients, self.latency), Exchange()

    def begin(self, x: torch.Tensor) -> list[Call]:
        """Sends half of the rows to each; returns what they are asked."""
        balance = Balance([[0], [1]], [True, True])
        experts = torch.arange(len(x)) % 2
        assert self.exchange.begin(self.lines, balance, 7, x, experts, experts, 40) == 42
        calls = []
        for number, server in enumerate(self.servers):
            (frame,) = server.receive()
            assert bytes(frame.payload) == bytes(memory(x[experts == number]))
            calls.append(decode_call(frame.header))
        return calls

    def close(self) -> None:
        for connection in (*self.clients, *self.servers):
            connection.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


@given(servers_of_experts, steps, st.integers(1, 3))
def test_rows_are_dealt_as_by_python(servers_of_experts, steps, ranks):
    copies = servers_of_experts
    balance, fast, exchange = Balance(copies, [True] * 4), Balance(copies, [True] * 4), Exchange()
    for step in steps:
        routed = np.array(step, np.int64)
        own = routed[routed % ranks == 0]
        order, segments = balance.deal(own, routed)
        with closing(Connection(socket.socket(socket.AF_UNIX))) as connection:  # to nobody
            lines, x = Lines([connection] * 4, [LatencyCounts()] * 4), torch.zeros(len(own), 2)
            exchange.begin(lines, fast, 0, x, torch.from_numpy(own), torch.from_numpy(routed), 1)
        assert exchange.order().tolist() == order.tolist()
        assert [exchange.segment(part) for part in exchange.parts()] == segments
        assert fast.given == balance.given


def answered(call: Call, payload: bytes) -> bytes:
    return frame_head(Reply(call.id, 0.5).encode(), memoryview(payload)) + payload


def test_answers_come_back_in_the_order_of_the_rows(pair):
    x = torch.randn(6, 5)
    calls = pair.begin(x)
    assert calls == [Call(40, 7, "float32", [0], [3]), Call(41, 7, "float32", [1], [3])]
    pair.sockets[1].send(answered(calls[1], bytes(memory(-x[1::2]))))
    first = answered(calls[0], bytes(memory(-x[::2])))
    pair.sockets[0].send(first[:50])  # the rest comes later
    threading.Timer(0.1, pair.sockets[0].send, [first[50:]]).start()
    assert pair.exchange.collect(5.0, 0.0)
    assert torch.equal(pair.exchange.out_kD, -x)
    assert [part.seconds for part in pair.exchange.parts()] == [0.5, 0.5]
    assert pair.lines.are_idle
    assert [sum(latency.counts) for latency in pair.latency] == [1, 1]
    assert 0.1 < pair.latency[0].sum < 1 < 1000 * pair.exchange.seconds_per_row


def test_an_answer_that_is_late_is_left_to_python(pair):
    x = torch.randn(4, 5)
    calls = pair.begin(x)
    pair.sockets[1].send(answered(calls[1], bytes(memory(x[1::2].contiguous()))))
    assert not pair.exchange.collect(0.05, 0.01)
    late, there = pair.exchange.parts()
    assert (late.answered, late.received, late.is_lost) == (-1, 0, False)
    assert 0 <= there.answered - there.begun < 0.05
    assert torch.equal(pair.exchange.out_kD[1::2], x[1::2])


@pytest.mark.parametrize("case", ["refusal", "late answer before it", "wrong length", "garbage"])
def test_what_is_no_answer_is_left_to_python(pair, case):
    x = torch.zeros(2, 5)
    (call, _) = pair.begin(x)
    refusal = Refusal(call.id, "not_held", "expert 0").encode()
    answer = answered(call, bytes(20))
    sent = {
        "refusal": frame_head(refusal, memoryview(b"")),
        "late answer before it": answered(Call(3, 7, "float32", [0], [1]), bytes(20)) + answer,
        "wrong length": answered(call, bytes(24)),
        "garbage": b"junk" * 100,
    }[case]
    pair.sockets[0].send(sent)
    assert not pair.exchange.collect(5.0, 0.0)
    part = pair.exchange.parts()[0]
    assert (part.answered, part.received) == (-1, len(sent))
    if case == "garbage":
        with pytest.raises(Disconnected, match="no frame"):
            pair.lines.received(part)
        return
    frames = pair.lines.received(part)
    assert len(frames) == (2 if case == "late answer before it" else 1)
    wanted = Refusal(call.id, "not_held", "expert 0") if case == "refusal" else Reply(call.id, 0.5)
    assert decode_answer(frames[-1].header) == wanted


@pytest.mark.parametrize("sent", [0, 30])
def test_a_closed_connection_is_left_to_python(pair, sent):
    (call, _) = pair.begin(torch.zeros(2, 5))
    pair.sockets[0].send(answered(call, bytes(20))[:sent])
    pair.servers[0].close()
    assert not pair.exchange.collect(5.0, 0.0)
    assert pair.exchange.parts()[0].is_lost


def test_so_is_one_that_takes_nothing(pair):
    pair.servers[1].close()
    balance = Balance([[1]], [True, True])
    experts = torch.zeros(1, dtype=torch.int64)
    pair.exchange.begin(pair.lines, balance, 7, torch.zeros(1, 5), experts, experts, 1)
    assert not pair.exchange.collect(5.0, 0.0)
    assert pair.exchange.parts()[0].is_lost


def test_a_full_socket_takes_a_part(pair):
    with suppress(BlockingIOError):
        while True:
            pair.clients[0]._stream.send(bytes(1 << 10))
    x, experts = torch.zeros(8, 512), torch.zeros(8, dtype=torch.int64)
    pair.exchange.begin(pair.lines, Balance([[0]], [True, True]), 7, x, experts, experts, 1)
    (part,) = pair.exchange.parts()
    assert 0 <= part.sent < part.bytes
    assert not pair.exchange.collect(5.0, 0.0)


@pytest.fixture
def server(moe_folder) -> Iterator[ExpertServer]:
    held = HeldExperts(open_checkpoint(moe_folder), torch.bfloat16)
    for expert in range(3):
        held.load((1, expert))
    server = ExpertServer(held, "127.0.0.1")
    server.start()
    yield server
    server.stop()


def answers_to(connection: Connection, count: int = 1) -> list[Frame]:
    frames: list[Frame] = []
    while len(frames) < count and select.select([connection], [], [], 5)[0]:
        frames += connection.receive()
    return frames


def call_of(x: torch.Tensor, experts: list[int], counts: list[int]) -> bytes:
    return frame_head(Call(1, 1, "bfloat16", experts, counts).encode(), memory(x)) + memory(x)


def test_a_server_answers_however_calls_arrive(server):
    x = torch.randn(6, server._experts.dim).bfloat16()
    expected = server._experts.compute(1, [0, 2], [2, 4], x)
    call = call_of(x, [0, 2], [2, 4])
    with closing(connect(server.address.unix, server.address.key, 5)) as connection:
        for pieces in ([call], [call[:40], call[40:]], [call + call[:100], call[100:]]):
            for piece in pieces:
                connection._stream.send(piece)
                time.sleep(0.05)
            calls = len(b"".join(pieces)) // len(call)
            answers = answers_to(connection, calls)
            assert [frame.payload for frame in answers] == [memory(expected)] * calls
    assert server.rows == {(1, 0): 10, (1, 2): 20}
    assert server.calls == 4


def test_a_server_answers_more_than_the_fast_path_takes(server):
    x = torch.randn(CAPACITY // (2 * server._experts.dim) + 1, server._experts.dim).bfloat16()
    with closing(connect(server.address.unix, server.address.key, 5)) as connection:
        connection.send(Call(1, 1, "bfloat16", [1], [len(x)]).encode(), memory(x))
        (answer,) = answers_to(connection)
    assert answer.payload == memory(server._experts.compute(1, [1], [len(x)], x))


@pytest.mark.parametrize(
    ("experts", "counts", "rows", "reason"),
    [([5], [1], 1, "not_held"), ([0], [2], 1, "invalid"), ([0], [0], 0, "invalid")],
)
def test_a_server_refuses_what_it_cannot_answer(server, experts, counts, rows, reason):
    with closing(connect(server.address.unix, server.address.key, 5)) as connection:
        connection._stream.send(call_of(torch.zeros(rows, server._experts.dim).bfloat16(), experts, counts))
        (answer,) = answers_to(connection)
        refusal = decode_answer(answer.header)
    assert isinstance(refusal, Refusal)
    assert refusal.reason == reason


def test_an_answer_that_the_socket_does_not_take_is_queued(server):
    """As of a client that does not read."""
    x = torch.randn(6, server._experts.dim).bfloat16()
    client, stream = socket.socketpair()
    connection, call = Connection(stream), call_of(x, [0, 2], [2, 4])
    answering, expected = Answering(server._experts), server._experts.compute(1, [0, 2], [2, 4], x)
    count = 0
    while not connection.is_sending:
        client.send(call)
        assert isinstance(answering.answer(connection), float)
        count += 1
    reader, answers = Connection(client), []
    while len(answers) < count:
        answers += [bytes(frame.payload) for frame in reader.receive()]
        connection.flush()
    assert answers == [bytes(memory(expected))] * count
    reader.close()
    connection.close()


class Sockets:
    """A client of expert servers whose ends the test holds. Expert 0 is on both servers, 1 and 2 on one each."""

    def __init__(self) -> None:
        table = RoutingTable(1, tuple(ServerAddress(name, "", "", "", b"") for name in "ab"), {7: HOLDERS})
        self.client = ExpertClient(OneTable(table), "127.0.0.1", deadline=1.0)
        self.ends: list[Connection] = []
        self.client._peers._adopt_table(table)
        for name in "ab":
            ours, theirs = socket.socketpair()
            self.client._peers._adopt_connection(name, Connection(ours))
            self.ends.append(Connection(theirs))

    def answer(self, end: Connection) -> None:
        """Every call with its own rows, until the connection is closed."""
        with suppress(Disconnected):
            while select.select([end], [], [], 5)[0]:
                for frame in end.receive():
                    end.send(Reply(decode_call(frame.header).id, 0.001).encode(), memoryview(bytes(frame.payload)))

    def close(self) -> None:
        self.client.close()
        for end in self.ends:
            end.close()


HOLDERS = ((0, 1), (0,), (1,))


@pytest.fixture
def sockets() -> Iterator[Sockets]:
    sockets = Sockets()
    yield sockets
    sockets.close()


def test_a_call_that_goes_elsewhere_does_not_come_between_the_halves_of_another(sockets):
    """The first server is gone, and the second's socket took a part of its frame."""
    second = sockets.client._peers.at(1).connection
    second._stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    sockets.ends[0].close()
    x, experts = torch.randn(8, 512), torch.tensor([0, 0, 2, 2, 2, 2, 2, 2])
    pending = sockets.client.layer(7).submit(x, experts)
    assert isinstance(pending, _Exchanged)
    assert [0 < part.sent < part.bytes for part in pending.exchange.parts()] == [False, True]
    threading.Thread(target=sockets.answer, args=[sockets.ends[1]], daemon=True).start()
    assert torch.equal(pending.wait(), x)
    assert second._stream.fileno() >= 0, "the second server is connected still"


def test_two_layers_under_way_and_one_that_nobody_waits_for(sockets):
    for end in sockets.ends:
        threading.Thread(target=sockets.answer, args=[end], daemon=True).start()
    experts, layer = torch.tensor([1, 2]), sockets.client.layer(7)
    first, second, third = (torch.randn(2, 5) for _ in range(3))
    pending = [layer.submit(first, experts), layer.submit(second, experts)]
    assert torch.equal(pending[1].wait(), second)
    assert torch.equal(pending[0].wait(), first)
    layer.submit(second, experts)
    assert torch.equal(layer.submit(third, experts).wait(), third)
    last = layer.submit(first, experts)
    assert isinstance(last, _Exchanged), "the fast path is back"
    assert torch.equal(last.wait(), first)
    assert sockets.client.counts.failovers.total() == 0


def test_bytes_that_are_no_frame_end_the_wait_at_once(pair):
    pair.begin(torch.zeros(2, 512))
    pair.sockets[0].send(b"junk" * 10)  # less than the answer would be
    begun = time.thread_time()
    assert not pair.exchange.collect(5.0, 0.0)
    assert time.thread_time() - begun < 1.0


def test_memory_is_laid_out_as_in_c():
    fields = len(Part.__annotations__)
    assert fast_path._PART.itemsize == 8 * fields == 96
