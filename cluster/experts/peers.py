"""Expert servers as a client knows them: the table in use, connections, who answers and who does not."""

import logging
import os
import select
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from cluster.experts.fast_path import Lines
from cluster.experts.following import Following
from cluster.experts.latency import LatencyCounts
from cluster.experts.routes import Balance
from cluster.experts.table import DirectoryClient, RoutingTable
from cluster.streams import Connection, Disconnected, Frame, frame_head

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Peer:
    """One server. It is suspect from a missed deadline until it answers anything."""

    id: str
    latency: LatencyCounts
    connection: Connection | None = None
    is_suspect: bool = False

    @property
    def is_usable(self) -> bool:
        return self.connection is not None and not self.is_suspect


class Peers:
    """All of them. Belongs to the thread that computes steps; `Following` has one of its own.

    host: this process's, as servers name theirs.
    """

    def __init__(self, directory: DirectoryClient, host: str) -> None:
        self.table: RoutingTable | None = None
        """The one in use; `adopt` changes it."""
        self.are_crowding = False
        """Whether those on this host need CPUs that this thread computes on otherwise."""
        self.latency: dict[str, LatencyCounts] = {}
        """Of answered calls, by server."""
        self._host = host
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._following = Following(directory, host, self._wake)
        self._by_id: dict[str, Peer] = {}
        self._by_fd: dict[int, Peer] = {}
        self._unnamed: list[Peer] = []
        """No table names them any more, but calls under way there may still be answered."""
        self._balances: dict[int, Balance] = {}
        self._current: set[int] = set()
        """Layers whose balance is of this table, and of the servers that answer now."""
        self._lines: tuple[list[Peer], Lines] | None = None
        """To the same, when that is all of the table."""

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
            self._disconnect(peer)
        self._epoll.close()
        if has_ended:  # else it may still write to it
            os.close(self._wake)

    def at(self, place: int) -> Peer:
        """The server in that place of the table."""
        assert self.table is not None
        return self._by_id[self.table.servers[place].id]

    def balance(self, layer: int) -> Balance:
        """Of the servers that answer."""
        if layer not in self._current:
            assert self.table is not None
            self._balances[layer] = Balance(self.table.layers[layer], self._usable(), self._balances.get(layer))
            self._current.add(layer)
        return self._balances[layer]

    def given(self, layer: int) -> "array[float]":
        """Rows of late, by place; empty before the first step with these servers."""
        return self._balances[layer].given if layer in self._balances else array("d")

    def lines(self) -> tuple[list[Peer], Lines] | None:
        """To every server of the table, by place, if all of them answer and nothing is under way there."""
        if self._lines is None and self.table is not None and all(self._usable()):
            peers = [self._by_id[server.id] for server in self.table.servers]
            connections = [peer.connection for peer in peers if peer.connection is not None]
            self._lines = peers, Lines(connections, [peer.latency for peer in peers])
        return self._lines if self._lines is not None and self._lines[1].are_idle else None

    def send(self, peer: Peer, header: bytes, payload: memoryview, sent: int = 0) -> None:
        """payload: not to be changed before it is answered. sent: so much of the frame went over a line.

        Raises Disconnected.
        """
        connection = peer.connection
        if connection is None:
            raise Disconnected("there is no connection")
        if sent:
            frame = frame_head(header, payload) + payload
            connection.queue(memoryview(frame)[sent:])
        else:
            connection.send(header, payload)
        if connection.is_sending:
            self._epoll.modify(connection.fileno(), select.EPOLLIN | select.EPOLLOUT)

    def poll(self, timeout: float) -> list[tuple[Peer, Frame | Disconnected]]:
        """What has been heard within `timeout` seconds, in order; Disconnected is the last of its peer.

        Frames are valid until the next call.
        """
        heard: list[tuple[Peer, Frame | Disconnected]] = []
        for fd, events in self._epoll.poll(timeout):
            if fd == self._wake:
                os.eventfd_read(self._wake)
                self.adopt()
                continue
            peer = self._by_fd.get(fd)
            if peer is None or peer.connection is None:
                continue
            try:
                if events & select.EPOLLOUT:
                    self._flush(fd, peer.connection)
                if events & ~select.EPOLLOUT:
                    heard += [(peer, frame) for frame in peer.connection.receive()]
            except Disconnected as error:
                heard.append((peer, error))
        return heard

    def adopt(self) -> None:
        """Takes what `Following` has found: a table, connections."""
        update = self._following.take()
        if update is None:
            return
        self._outdated()
        if update.table is not None:
            self._adopt_table(update.table)
        for name, connection in update.connections:
            self._adopt_connection(name, connection)

    def trust(self, peer: Peer) -> None:
        """It has answered."""
        if peer.is_suspect:
            logger.info("expert server %s answers again", peer.id)
            peer.is_suspect = False
            self._outdated()

    def suspect(self, peer: Peer, seconds: float) -> None:
        """It has not answered for so long."""
        if not peer.is_suspect:
            logger.warning("expert server %s did not answer for %.0f ms: others are asked", peer.id, 1000 * seconds)
            peer.is_suspect = True
            self._outdated()

    def lose(self, peer: Peer, why: str) -> None:
        """The connection is of no more use; `Following` opens another when it can."""
        if peer.connection is None:
            return
        logger.warning("expert server %s is lost (%s): others are asked", peer.id, why)
        self._disconnect(peer)
        peer.is_suspect = False
        self._outdated()
        self._following.reconnect(peer.id)

    def discard_unnamed(self, asked: Iterable[Peer]) -> None:
        """Hangs up on servers that no table names, but for those that are `asked` for something."""
        if not self._unnamed:  # as after nearly every layer of every step
            return
        kept = set(asked)
        for peer in self._unnamed:
            if peer not in kept:
                self._disconnect(peer)
        self._unnamed = [peer for peer in self._unnamed if peer in kept]

    def lacking(self) -> str:
        """Why steps would wait; empty when every expert has a server that answers."""
        self.adopt()
        if self.table is None:
            return "no table from the directory yet"
        if missing := self.table.missing():
            return f"{len(missing)} experts are on no server yet"
        usable = self._usable()
        layers = self.table.layers.values()
        unserved = sum(not any(usable[place] for place in holders) for experts in layers for holders in experts)
        silent = [server.id for server, is_usable in zip(self.table.servers, usable, strict=True) if not is_usable]
        return f"{unserved} experts are only on servers that do not answer: {', '.join(silent)}" if unserved else ""

    def _peer(self, name: str) -> Peer:
        if name not in self._by_id:
            self._by_id[name] = Peer(name, self.latency.setdefault(name, LatencyCounts()))
        return self._by_id[name]

    def _outdated(self) -> None:
        self._current.clear()
        self._lines = None

    def _usable(self) -> list[bool]:
        """By place in the table."""
        assert self.table is not None
        return [self._by_id[server.id].is_usable for server in self.table.servers]

    def _flush(self, fd: int, connection: Connection) -> None:
        connection.flush()
        if not connection.is_sending:
            self._epoll.modify(fd, select.EPOLLIN)

    def _adopt_table(self, table: RoutingTable) -> None:
        if self.table is not None and self.table.servers != table.servers:
            for balance in self._balances.values():
                balance.forget()
        self.table = table
        near = sum(server.host == self._host for server in table.servers)
        self.are_crowding = near > 0 and near + torch.get_num_threads() > len(os.sched_getaffinity(0))
        named = {server.id for server in table.servers}
        self._unnamed += [self._by_id.pop(name) for name in list(self._by_id) if name not in named]
        for name in named:
            self._peer(name)

    def _adopt_connection(self, name: str, connection: Connection) -> None:
        peer = self._peer(name)  # a connection may come before the table that names it
        if peer.connection is not None:
            connection.close()
            return
        peer.connection = connection
        self._by_fd[connection.fileno()] = peer
        self._epoll.register(connection.fileno(), select.EPOLLIN)

    def _disconnect(self, peer: Peer) -> None:
        if peer.connection is None:
            return
        self._epoll.unregister(peer.connection.fileno())
        del self._by_fd[peer.connection.fileno()]
        peer.connection.close()
        peer.connection = None
