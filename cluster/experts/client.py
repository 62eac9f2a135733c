"""Experts on other processes, as a model sees them: `ExpertClient.layer(i)` is an `Experts`.

The thread that computes steps sends and receives; a second one follows the directory and opens
connections, so that a step never waits for either. When an answer does not come in time, the same
rows go to another copy within the step, and whichever answer is first counts. A call has no effect
on a server but its answer, so asking twice is safe, and every copy computes the same bits.
"""

import itertools
import logging
import os
import select
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.experts.following import Following
from cluster.experts.latency import LatencyCounts
from cluster.experts.messages import Call, Refusal, Reply, decode_answer, encode
from cluster.experts.routes import Balance, Segment
from cluster.experts.table import DirectoryClient, RoutingTable
from cluster.streams import Connection, Disconnected, Frame

logger = logging.getLogger(__name__)

DEADLINE_SECONDS = 0.1
"""For an answer, beyond four times what its rows usually take; then another copy is asked as well."""
GIVE_UP_SECONDS = 60.0
"""How long a step waits while no copy of an expert answers."""

_NAMES: dict[torch.dtype, Literal["bfloat16", "float32"]] = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


class ExpertsUnavailable(Exception):
    """No copy of an expert answered for so long that the step was given up. The message names the experts."""


class ExpertsNotReady(Exception):
    """There are not enough expert servers to begin with. The message says what is missing."""


@dataclass(eq=False)
class _Call:
    """Rows under way to one server."""

    id: int
    segment: Segment
    sent: float
    due: float
    tried: frozenset[str]
    """Servers that were asked for these rows before, and this one."""


@dataclass(eq=False)
class _Peer:
    """A server as this client knows it. It is suspect from a missed deadline until it answers anything."""

    id: str
    connection: Connection | None = None
    is_suspect: bool = False

    @property
    def is_usable(self) -> bool:
        return self.connection is not None and not self.is_suspect


@dataclass
class ClientCounts:
    """failovers: calls sent to another copy, by the server that did not answer. latency: of answered calls."""

    failovers: Counter[tuple[str, int]] = field(default_factory=Counter)
    latency: dict[str, LatencyCounts] = field(default_factory=dict)
    waits: int = 0
    """Times that a step found no copy of an expert to ask."""


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
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._following = Following(directory, host, self._wake)
        self._table: RoutingTable | None = None
        self._peers: dict[str, _Peer] = {}
        self._by_fd: dict[int, _Peer] = {}
        self._unnamed: list[_Peer] = []
        """No table names them any more, but calls under way there may still be answered."""
        self._balances: dict[int, Balance] = {}
        self._calls: dict[int, _Call] = {}
        self._ids = itertools.count(1)
        self._seconds_per_row = 0.0
        self.counts = ClientCounts()

    def start(self) -> None:
        self._following.start()

    def close(self) -> None:
        """Safe to call twice."""
        if self._epoll.closed:
            return
        has_ended = self._following.stop()
        if (update := self._following.take()) is not None:
            for _, connection in update.connections:
                connection.close()
        for peer in list(self._by_fd.values()):
            self._discard(peer)
        self._peers.clear()
        self._epoll.close()
        if has_ended:  # else it may still write to it
            os.close(self._wake)

    def wait_until_ready(self, timeout: float) -> None:
        """Returns when every expert has a server that answers. Raises ExpertsNotReady after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        told = ""
        while (lacking := self._lacking()) and time.monotonic() < deadline:
            if lacking != told:
                logger.info("waiting for experts: %s", lacking)
                told = lacking
            self._poll(0.2)
        if lacking:
            raise ExpertsNotReady(f"not ready after {timeout:.0f} s: {lacking}")

    def layer(self, layer: int) -> "RemoteExperts":
        """The experts of `layer`."""
        return RemoteExperts(self, layer)

    @property
    def table(self) -> RoutingTable | None:
        """The one in use."""
        return self._table

    def submit(self, layer: int, x_kD: Tensor, experts_k: Tensor) -> "PendingRows":
        self._adopt()
        if self._table is None or layer not in self._table.layers:
            raise ExpertsNotReady(f"no expert server has told of layer {layer} yet")
        order, segments = self._balance_of(layer).deal(experts_k.numpy())
        pending = PendingRows(self, layer, x_kD, order)
        for segment in segments:
            self._send(pending, segment, frozenset())
        return pending

    def _balance_of(self, layer: int) -> Balance:
        found = self._balances.get(layer)
        if found is None:
            assert self._table is not None
            usable = [self._peers[server.id].is_usable for server in self._table.servers]
            found = self._balances[layer] = Balance(self._table.layers[layer], usable)
        return found

    def _send(self, pending: "PendingRows", segment: Segment, tried: frozenset[str]) -> None:
        """Sends rows to the segment's server, or notes that they have nowhere to go."""
        table = self._table
        assert table is not None
        peer = self._peers[table.servers[segment.server].id] if segment.server >= 0 else None
        if peer is None or peer.connection is None:
            pending.stranded.append((segment, tried))
            return
        rows = pending.rows[segment.start : segment.stop]
        call = Call(next(self._ids), pending.layer, pending.dtype, segment.experts, segment.counts)
        now = time.monotonic()
        allowed = self._deadline + 4 * len(rows) * self._seconds_per_row
        sent = _Call(call.id, segment, now, now + allowed, tried | {peer.id})
        try:
            peer.connection.send(encode(call), rows)
            if peer.connection.is_sending:
                self._epoll.modify(peer.connection.fileno(), select.EPOLLIN | select.EPOLLOUT)
            self._calls[call.id] = sent
            pending.calls[call.id] = peer
        except Disconnected as error:
            self._lose(peer, str(error), pending)
            self._reroute(pending, sent, peer)

    def _reroute(self, pending: "PendingRows", call: _Call, peer: _Peer) -> None:
        """Sends the rows of `call` to other copies, as far as there are any that were not asked."""
        self.counts.failovers[peer.id, pending.layer] += 1
        self._scatter(pending, call.segment, call.tried)

    def _scatter(self, pending: "PendingRows", segment: Segment, tried: frozenset[str]) -> None:
        table = self._table
        assert table is not None
        start = segment.start
        for expert, count in zip(segment.experts, segment.counts, strict=True):
            at = [copy.server for copy in table.layers[pending.layer][expert]]
            untried = [server for server in at if table.servers[server].id not in tried]
            choice = self._choose(untried, expert)
            self._send(pending, Segment(choice, start, start + count, [expert], [count]), tried)
            start += count

    def _choose(self, servers: list[int], expert: int) -> int:
        """One of `servers` (places in the table) that answers, else one that is connected, else -1."""
        assert self._table is not None
        peers = {server: self._peers[self._table.servers[server].id] for server in servers}
        connected = [server for server in servers if peers[server].connection is not None]
        best = [server for server in connected if peers[server].is_usable] or connected
        return best[expert % len(best)] if best else -1

    def wait(self, pending: "PendingRows") -> None:
        """Until every row of `pending` is there. Raises ExpertsUnavailable."""
        try:
            self._wait(pending)
        finally:
            for call in pending.calls:
                self._calls.pop(call, None)
            if self._unnamed:
                self._discard_unnamed()

    def _wait(self, pending: "PendingRows") -> None:
        begun = time.monotonic()
        while pending.missing:
            now = time.monotonic()
            if pending.calls:
                due = min(self._calls[call].due for call in pending.calls)
                timeout = min(max(due - now, 0.0), 0.05 if pending.stranded else 1.0)
            else:
                timeout = 0.05
            self._poll(timeout, pending)
            if not pending.missing:
                break
            now = time.monotonic()
            self._check_deadlines(pending, now)
            if pending.stranded:
                self._retry_stranded(pending)
            if now - begun > self._give_up:
                raise ExpertsUnavailable(self._why(pending, now - begun))

    def _check_deadlines(self, pending: "PendingRows", now: float) -> None:
        for id, peer in list(pending.calls.items()):
            call = self._calls.get(id)
            if call is None or call.due > now:
                continue
            call.due = float("inf")  # its answer still counts if it comes first
            self._suspect(peer, now - call.sent)
            pending.expect_twice([self._calls[id].segment for id in pending.calls])
            if pending.lacks(call.segment):
                self._reroute(pending, call, peer)

    def _retry_stranded(self, pending: "PendingRows") -> None:
        stranded, pending.stranded = pending.stranded, []
        if not pending.has_waited:
            self.counts.waits += 1
            pending.has_waited = True
        for segment, _ in stranded:
            # A server that did not answer before may have come back: from here on each is asked again.
            asked = {peer.id for id, peer in pending.calls.items() if self._calls[id].segment.overlaps(segment)}
            if pending.lacks(segment):
                self._scatter(pending, segment, frozenset(asked))

    def _why(self, pending: "PendingRows", seconds: float) -> str:
        segments = [self._calls[id].segment for id in pending.calls] + [segment for segment, _ in pending.stranded]
        experts = sorted({e for segment in segments if pending.lacks(segment) for e in segment.experts})
        assert self._table is not None
        named = {copy.server for expert in experts for copy in self._table.layers[pending.layer][expert]}
        servers = ", ".join(sorted(self._table.servers[server].id for server in named))
        who = f"servers {servers} are silent or gone" if named else "no server holds them"
        return f"experts {experts} of layer {pending.layer} did not answer for {seconds:.0f} s: {who}"

    def _poll(self, timeout: float, pending: "PendingRows | None" = None) -> None:
        for fd, events in self._epoll.poll(timeout):
            if fd == self._wake:
                os.eventfd_read(self._wake)
                self._adopt()
                continue
            peer = self._by_fd.get(fd)
            if peer is None or peer.connection is None:
                continue
            try:
                if events & select.EPOLLOUT:
                    peer.connection.flush()
                    if not peer.connection.is_sending:
                        self._epoll.modify(fd, select.EPOLLIN)
                if events & ~select.EPOLLOUT:
                    for frame in peer.connection.receive():
                        self._take(peer, frame, pending)
            except Disconnected as error:
                self._lose(peer, str(error), pending)

    def _take(self, peer: _Peer, frame: Frame, pending: "PendingRows | None") -> None:
        answer = decode_answer(frame.header)
        call = self._calls.get(answer.id)
        if peer.is_suspect:
            logger.info("expert server %s answers again", peer.id)
            peer.is_suspect = False
            self._balances.clear()
        if call is None or pending is None or answer.id not in pending.calls:
            return  # late: another copy's answer was taken
        if isinstance(answer, Reply) and len(frame.payload) != pending.num_bytes(call.segment):
            raise Disconnected(f"it answered {len(frame.payload)} bytes, not {pending.num_bytes(call.segment)}")
        del self._calls[answer.id], pending.calls[answer.id]
        if isinstance(answer, Refusal):
            if answer.reason != "not_held":
                logger.warning("expert server %s: %s", peer.id, answer.message)
            self._reroute(pending, call, peer)
            return
        seconds = time.monotonic() - call.sent
        self.counts.latency.setdefault(peer.id, LatencyCounts()).observe(seconds)
        self._seconds_per_row += 0.01 * (answer.seconds / call.segment.num_rows - self._seconds_per_row)
        pending.fill(call.segment, frame.payload)

    def _suspect(self, peer: _Peer, seconds: float) -> None:
        if not peer.is_suspect:
            logger.warning("expert server %s did not answer for %.0f ms: others are asked", peer.id, 1000 * seconds)
            peer.is_suspect = True
            self._balances.clear()

    def _lose(self, peer: _Peer, why: str, pending: "PendingRows | None" = None) -> None:
        """The connection is gone; `Following` opens another when it can."""
        if peer.connection is None:
            return
        logger.warning("expert server %s is lost (%s): others are asked", peer.id, why)
        fd = peer.connection.fileno()
        self._epoll.unregister(fd)
        del self._by_fd[fd]
        peer.connection.close()
        peer.connection, peer.is_suspect = None, False
        self._balances.clear()
        self._following.reconnect(peer.id)
        if pending is not None:
            for id in [id for id, asked in pending.calls.items() if asked is peer]:
                del pending.calls[id]
                call = self._calls.pop(id)
                if pending.lacks(call.segment):
                    self._reroute(pending, call, peer)

    def _adopt(self) -> None:
        """Takes what `Following` has found: a table, connections."""
        update = self._following.take()
        if update is None:
            return
        self._balances.clear()
        if update.table is not None:
            self._adopt_table(update.table)
        for name, connection in update.connections:
            self._adopt_connection(name, connection)

    def _adopt_table(self, table: RoutingTable) -> None:
        self._table = table
        named = {server.id for server in table.servers}
        for name in [name for name in self._peers if name not in named]:
            self._unnamed.append(self._peers.pop(name))
        self._discard_unnamed()
        for name in named:
            self._peers.setdefault(name, _Peer(name))

    def _adopt_connection(self, name: str, connection: Connection) -> None:
        peer = self._peers.setdefault(name, _Peer(name))  # a connection may come before the table that names it
        if peer.connection is not None:
            connection.close()
            return
        peer.connection = connection
        self._by_fd[connection.fileno()] = peer
        self._epoll.register(connection.fileno(), select.EPOLLIN)

    def _discard_unnamed(self) -> None:
        asked = {server for call in self._calls.values() for server in call.tried}
        for peer in self._unnamed:
            if peer.id not in asked:
                self._discard(peer)
        self._unnamed = [peer for peer in self._unnamed if peer.id in asked]

    def _discard(self, peer: _Peer) -> None:
        if peer.connection is None:
            return
        self._epoll.unregister(peer.connection.fileno())
        del self._by_fd[peer.connection.fileno()]
        peer.connection.close()
        peer.connection = None

    def _lacking(self) -> str:
        self._adopt()
        if self._table is None:
            return "no table from the directory yet"
        if missing := self._table.missing():
            return f"{len(missing)} experts are on no server yet"
        usable = [self._peers[server.id].is_usable for server in self._table.servers]
        layers = self._table.layers.values()
        unserved = sum(not any(usable[copy.server] for copy in copies) for experts in layers for copies in experts)
        silent = [server.id for server, is_usable in zip(self._table.servers, usable, strict=True) if not is_usable]
        return f"{unserved} experts are only on servers that do not answer: {', '.join(silent)}" if unserved else ""


class RemoteExperts:
    """The experts of one layer."""

    is_whole = True

    def __init__(self, client: ExpertClient, layer: int) -> None:
        self._client, self._layer = client, layer

    def submit(self, x_kD: Tensor, experts_k: Tensor) -> "PendingRows":
        """x_kD: bfloat16 or float32 [k, D] on the CPU; experts_k: int64 [k]."""
        return self._client.submit(self._layer, x_kD, experts_k)


class PendingRows:
    """Rows of one layer under way, sorted by where they went."""

    def __init__(self, client: ExpertClient, layer: int, x_kD: Tensor, order: NDArray[np.int64]) -> None:
        self._client, self.layer, self.dtype = client, layer, _NAMES[x_kD.dtype]
        self._order = torch.from_numpy(order)
        self.rows = x_kD[self._order]
        self._out = torch.empty_like(self.rows)
        self.missing = len(order)
        self._filled: NDArray[np.bool_] | None = None
        self.calls: dict[int, _Peer] = {}
        self.stranded: list[tuple[Segment, frozenset[str]]] = []
        self.has_waited = False

    def wait(self) -> Tensor:
        """[k, D], in the order of submission. Raises ExpertsUnavailable."""
        self._client.wait(self)
        return torch.empty_like(self._out).index_copy_(0, self._order, self._out)

    def lacks(self, segment: Segment) -> bool:
        """Whether any row of `segment` has not come."""
        return self._filled is None or not self._filled[segment.start : segment.stop].all()

    def num_bytes(self, segment: Segment) -> int:
        return segment.num_rows * self._out.stride(0) * self._out.itemsize

    def fill(self, segment: Segment, payload: Tensor) -> None:
        """Takes the answer for `segment`; rows that another answer brought before stay as they are."""
        target = self._out[segment.start : segment.stop]
        target.copy_(payload.view(target.dtype).view_as(target))
        if self._filled is None:
            self.missing -= len(target)
            return
        self.missing -= int((~self._filled[segment.start : segment.stop]).sum())
        self._filled[segment.start : segment.stop] = True

    def expect_twice(self, under_way: list[Segment]) -> None:
        """From now on rows may come from two servers: keeps account of which are there."""
        if self._filled is None:
            self._filled = np.ones(len(self._out), np.bool_)
            for segment in [*under_way, *(segment for segment, _ in self.stranded)]:
                self._filled[segment.start : segment.stop] = False
