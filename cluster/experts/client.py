"""Experts on other processes, as a model sees them: `ExpertClient.layer(i)` is an `Experts`.

The thread that computes steps sends and receives; a second one follows the directory and opens
connections, so that a step never waits for either. When an answer does not come in time, the same
rows go to another copy within the step, and whichever answer is first counts. A call has no effect
on a server but its answer, so asking twice is safe, and every copy computes the same bits.

While all servers answer, fast_path.py does most of this; what it finds unusual, `_take_over` brings here.
"""

import logging
import time
from array import array
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cluster.experts import fast_path
from cluster.experts.fast_path import Exchange, Lines, Part
from cluster.experts.latency import LatencyCounts
from cluster.experts.messages import Call, Refusal, Reply, decode_answer
from cluster.experts.peers import Peer, Peers
from cluster.experts.routes import Segment
from cluster.experts.rows import Rows
from cluster.experts.table import DirectoryClient, RoutingTable
from cluster.streams import Disconnected, Frame, memory
from model.kernels import cpu
from model.moe import PendingExperts

logger = logging.getLogger(__name__)

DEADLINE_SECONDS = 0.1
"""For an answer, beyond four times what its rows usually take; then another copy is asked as well."""
GIVE_UP_SECONDS = 60.0
"""How long a step waits while no copy of an expert answers."""


class ExpertsUnavailable(Exception):
    """No copy of an expert answered for so long that the step was given up. The message names the experts."""


class ExpertsNotReady(Exception):
    """There are not enough expert servers to begin with. The message says what is missing."""


@dataclass
class ClientCounts:
    """latency: of answered calls, by server. failovers: calls sent to another copy, by the server that did not answer
    and layer. waits: times that a step found no copy of an expert to ask. epoch: of the table in use."""

    latency: dict[str, LatencyCounts]
    failovers: Counter[tuple[str, int]] = field(default_factory=Counter)
    waits: int = 0
    epoch: int = 0


class ExpertClient:
    """The experts of all layers. `layer` and what it returns belong to the thread that computes steps.

    host: this process's, as servers name theirs. Raises nothing at construction; `wait_until_ready` does.
    """

    def __init__(
        self,
        directory: DirectoryClient,
        host: str,
        deadline: float = DEADLINE_SECONDS,
        give_up: float = GIVE_UP_SECONDS,
    ) -> None:
        self._deadline, self._give_up = deadline, give_up
        self._peers = Peers(directory, host)
        self._calls: dict[int, _Call] = {}
        self._next_id = 1
        self._exchange = Exchange() if fast_path.available() else None
        self._exchanged: _Exchanged | None = None
        """What is under way on the fast path."""
        self._seconds_per_row = 0.0
        self.counts = ClientCounts(self._peers.latency)

    def start(self) -> None:
        self._peers.start()

    def close(self) -> None:
        """Safe to call twice."""
        self._peers.close()

    def wait_until_ready(self, timeout: float) -> None:
        """Returns when every expert has a server that answers. Raises ExpertsNotReady after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        told = ""
        while (lacking := self._peers.lacking()) and time.monotonic() < deadline:
            if lacking != told:
                logger.info("waiting for experts: %s", lacking)
                told = lacking
            self._poll(0.2)
        if lacking:
            raise ExpertsNotReady(f"not ready after {timeout:.0f} s: {lacking}")

    def layer(self, layer: int) -> "RemoteExperts":
        """The experts of `layer`."""
        return RemoteExperts(self, layer)

    def snapshot(self) -> ClientCounts:
        """The counts as they are now, for any thread and process."""
        return ClientCounts(self.counts.latency.copy(), self.counts.failovers.copy(), self.counts.waits, self.epoch)

    @property
    def epoch(self) -> int:
        """Of the table in use; 0 before the first."""
        return self._peers.table.epoch if self._peers.table else 0

    @property
    def table(self) -> RoutingTable | None:
        """The one in use."""
        return self._peers.table

    def submit(self, layer: int, x_kD: Tensor, experts_k: Tensor, routed_k: Tensor) -> PendingExperts:
        self._peers.adopt()
        table = self._peers.table
        if table is None or layer not in table.layers:
            raise ExpertsNotReady(f"no expert server has told of layer {layer} yet")
        if self._peers.are_crowding:
            cpu.park(True)
        if self._exchanged is not None:
            self._take_over(self._exchanged)
        balance, exchange = self._peers.balance(layer), self._exchange
        if exchange and balance.is_whole and exchange.takes(x_kD, experts_k, routed_k) and (to := self._peers.lines()):
            self._next_id = exchange.begin(to[1], balance, layer, x_kD, experts_k, routed_k, self._next_id)
            self._exchanged = _Exchanged(self, exchange, to[0])
            return self._exchanged
        order, segments = balance.deal(experts_k.numpy(), routed_k.numpy())
        pending = PendingRows(self, layer, Rows(x_kD, order))
        for segment in segments:
            self._send(pending, segment, frozenset())
        return pending

    def _send(self, pending: "PendingRows", segment: Segment, tried: frozenset[str]) -> None:
        """Sends rows to the segment's server, or notes that they have nowhere to go."""
        if segment.server < 0:
            pending.stranded.append(segment)
            return
        peer = self._peers.at(segment.server)
        call = self._call(self._next_id, pending, peer, segment, time.monotonic(), tried)
        self._next_id += 1
        try:
            self._peers.send(peer, call.header(), pending.rows.part(segment))
        except Disconnected as error:
            self._lose(peer, str(error))
            self._reroute(call)
            return
        self._calls[call.id] = pending.calls[call.id] = call

    def _call(
        self, id: int, pending: "PendingRows", peer: Peer, segment: Segment, sent: float, tried: frozenset[str]
    ) -> "_Call":
        due = sent + self._deadline + 4 * segment.num_rows * self._seconds_per_row
        return _Call(id, pending, peer, segment, sent, due, tried)

    def _reroute(self, call: "_Call") -> None:
        """Sends the rows of `call` to other copies, as far as there are any that were not asked."""
        if call.pending.rows.lack(call.segment):
            self.counts.failovers[call.peer.id, call.pending.layer] += 1
            self._scatter(call.pending, call.segment, call.tried | {call.peer.id})

    def _scatter(self, pending: "PendingRows", segment: Segment, tried: frozenset[str]) -> None:
        start = segment.start
        for expert, count in zip(segment.experts, segment.counts, strict=True):
            place = self._choose(pending.layer, expert, tried)
            self._send(pending, Segment(place, start, start + count, [expert], [count]), tried)
            start += count

    def _choose(self, layer: int, expert: int, tried: frozenset[str]) -> int:
        """A server (its place in the table) that holds the expert and answers, else one that is connected, else -1."""
        table = self._peers.table
        assert table is not None
        holders = [(place, self._peers.at(place)) for place in table.layers[layer][expert]]
        connected = [(place, peer) for place, peer in holders if peer.connection is not None and peer.id not in tried]
        best = [place for place, peer in connected if peer.is_usable] or [place for place, _ in connected]
        return best[expert % len(best)] if best else -1

    def collect(self, exchanged: "_Exchanged", give_up: float | None = None) -> Tensor:
        """[k, D], in the order of submission. Raises ExpertsUnavailable."""
        exchange = exchanged.exchange
        if exchanged.taken_over is None:
            exchange.seconds_per_row = self._seconds_per_row
            is_done = exchange.collect(self._deadline, 4 * self._seconds_per_row)
            self._seconds_per_row = exchange.seconds_per_row
            if not is_done:
                self._take_over(exchanged)
        if exchanged.taken_over is not None:
            return exchanged.taken_over.wait(give_up)
        self._exchanged = None
        cpu.park(False)
        self._discard_unnamed()
        return exchange.out_kD

    def _take_over(self, exchanged: "_Exchanged") -> None:
        """What is not as usual is none of the fast path's business, nor is a second layer beside the first."""
        exchange, peers, order = exchanged.exchange, exchanged.peers, exchanged.exchange.order()
        self._exchanged = None
        pending = exchanged.taken_over = PendingRows(self, exchange.layer, Rows(exchange.x_kD, order))
        parts = [(part, exchange.segment(part)) for part in exchange.parts()]
        for part, segment in parts:
            if part.answered >= 0:
                pending.rows.fill(segment, memory(exchange.out_kD[torch.from_numpy(order[part.start : part.stop])]))
            else:
                call = self._call(part.id, pending, peers[part.server], segment, part.begun, frozenset())
                self._calls[call.id] = pending.calls[call.id] = call
        # Rests of frames first: a call that goes to another server must not come between the parts of one.
        for part, _ in sorted(parts, key=lambda of: not 0 < of[0].sent < of[0].bytes):
            if (under_way := pending.calls.get(part.id)) is not None:
                self._resume(under_way, part, exchange.lines)

    def _resume(self, call: "_Call", part: Part, lines: Lines) -> None:
        try:
            if part.is_lost:
                raise Disconnected("it is gone or hung up")
            if part.sent < part.bytes:
                self._peers.send(call.peer, call.header(), call.pending.rows.part(call.segment), part.sent)
            for frame in lines.received(part):
                self._take(call.peer, frame)
        except Disconnected as error:
            self._lose(call.peer, str(error))

    def wait(self, pending: "PendingRows", give_up: float | None = None) -> None:
        """Until every row of `pending` is there. Raises ExpertsUnavailable."""
        try:
            self._wait(pending, self._give_up if give_up is None else give_up)
        finally:
            cpu.park(False)
            for id in pending.calls:
                del self._calls[id]
            pending.calls.clear()
            self._discard_unnamed()

    def given(self, layer: int) -> "array[float]":
        return self._peers.given(layer)

    def _discard_unnamed(self) -> None:
        self._peers.discard_unnamed(call.peer for call in self._calls.values())

    def _wait(self, pending: "PendingRows", give_up: float) -> None:
        begun = time.monotonic()
        while pending.rows.missing:
            timeout = 0.05
            if pending.calls:
                due = min(call.due for call in pending.calls.values()) - time.monotonic()
                timeout = min(max(due, 0.0), 0.05 if pending.stranded else 1.0)
            self._poll(timeout)
            if not pending.rows.missing:
                return
            now = time.monotonic()
            self._check_deadlines(pending, now)
            if pending.stranded:
                self._retry_stranded(pending)
            if now - begun > give_up:
                raise ExpertsUnavailable(self._why(pending, now - begun))

    def _check_deadlines(self, pending: "PendingRows", now: float) -> None:
        for call in list(pending.calls.values()):
            if call.due <= now:
                call.due = float("inf")  # its answer still counts if it comes first
                self._peers.suspect(call.peer, now - call.sent)
                pending.rows.expect_twice()
                self._reroute(call)

    def _retry_stranded(self, pending: "PendingRows") -> None:
        stranded, pending.stranded = pending.stranded, []
        if not pending.has_waited:
            self.counts.waits += 1
            pending.has_waited = True
        for segment in stranded:
            # A server that did not answer before may have come back: from here on each is asked again.
            asked = {call.peer.id for call in pending.calls.values() if call.segment.overlaps(segment)}
            if pending.rows.lack(segment):
                self._scatter(pending, segment, frozenset(asked))

    def _why(self, pending: "PendingRows", seconds: float) -> str:
        segments = [call.segment for call in pending.calls.values()] + pending.stranded
        experts = sorted({e for segment in segments if pending.rows.lack(segment) for e in segment.experts})
        table = self._peers.table
        assert table is not None
        named = {place for expert in experts for place in table.layers[pending.layer][expert]}
        servers = ", ".join(sorted(table.servers[server].id for server in named))
        who = f"servers {servers} are silent or gone" if named else "no server holds them"
        return f"experts {experts} of layer {pending.layer} did not answer for {seconds:.0f} s: {who}"

    def _poll(self, timeout: float) -> None:
        for peer, heard in self._peers.poll(timeout):
            if isinstance(heard, Disconnected):
                self._lose(peer, str(heard))
                continue
            try:
                self._take(peer, heard)
            except Disconnected as error:
                self._lose(peer, str(error))

    def _take(self, peer: Peer, frame: Frame) -> None:
        answer = decode_answer(frame.header)
        self._peers.trust(peer)
        call = self._calls.get(answer.id)
        if call is None or call.peer is not peer:
            return  # late: another copy's answer was taken
        rows = call.pending.rows
        if isinstance(answer, Reply) and len(frame.payload) != rows.num_bytes(call.segment):
            raise Disconnected(f"it answered {len(frame.payload)} bytes, not {rows.num_bytes(call.segment)}")
        self._forget(call)
        if isinstance(answer, Refusal):
            if answer.reason != "not_held":
                logger.warning("expert server %s: %s", peer.id, answer.message)
            self._reroute(call)
            return
        rows.fill(call.segment, frame.payload)
        self._count(peer, time.monotonic() - call.sent, answer.seconds, call.segment.num_rows)

    def _count(self, peer: Peer, latency: float, seconds: float, num_rows: int) -> None:
        """An answer: how long it took, and the server for it."""
        peer.latency.observe(latency)
        self._seconds_per_row += 0.01 * (seconds / num_rows - self._seconds_per_row)

    def _lose(self, peer: Peer, why: str) -> None:
        self._peers.lose(peer, why)
        for call in [call for call in self._calls.values() if call.peer is peer]:
            self._forget(call)
            self._reroute(call)

    def _forget(self, call: "_Call") -> None:
        del self._calls[call.id], call.pending.calls[call.id]


class RemoteExperts:
    """The experts of one layer."""

    is_whole = True

    def __init__(self, client: ExpertClient, layer: int) -> None:
        self._client, self._layer = client, layer

    def submit(self, x_kD: Tensor, experts_k: Tensor, routed_k: Tensor | None = None) -> PendingExperts:
        """x_kD: bfloat16 or float32 [k, D] on the CPU, not to be changed before `wait` returns; experts_k: int64 [k];
        routed_k: int64 [any], which has all of an expert's rows that are in experts_k, and no more of those."""
        return self._client.submit(self._layer, x_kD, experts_k, experts_k if routed_k is None else routed_k)

    @property
    def given(self) -> "array[float]":
        """Rows that each server was given of late, which decides who is given the next. Ranks that share this layer's
        rows must be of one mind; values may be written."""
        return self._client.given(self._layer)


class _Exchanged:
    """Rows of one layer on the fast path, to be waited for once; `taken_over`: where they are, once they have left it.

    peers: by place.
    """

    def __init__(self, client: ExpertClient, exchange: Exchange, peers: list[Peer]) -> None:
        self._client, self.exchange, self.peers = client, exchange, peers
        self.taken_over: PendingRows | None = None

    def wait(self, give_up: float | None = None) -> Tensor:
        """[k, D], in the order of submission. Raises ExpertsUnavailable."""
        return self._client.collect(self, give_up)


class PendingRows:
    """Rows of one layer under way, in calls; `stranded` are those that no server can be asked for now."""

    def __init__(self, client: ExpertClient, layer: int, rows: Rows) -> None:
        self._client, self.layer, self.rows = client, layer, rows
        self.calls: dict[int, _Call] = {}
        self.stranded: list[Segment] = []
        self.has_waited = False

    def wait(self, give_up: float | None = None) -> Tensor:
        """[k, D], in the order of submission. Raises ExpertsUnavailable."""
        self._client.wait(self, give_up)
        return self.rows.returned()


@dataclass(eq=False, slots=True)
class _Call:
    """Rows under way to one server. tried: the servers that were asked for them before."""

    id: int
    pending: PendingRows
    peer: Peer
    segment: Segment
    sent: float
    due: float
    tried: frozenset[str]

    def header(self) -> bytes:
        rows = self.pending.rows
        return Call(self.id, self.pending.layer, rows.dtype, self.segment.experts, self.segment.counts).encode()
