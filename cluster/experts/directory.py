"""Decides which server holds which experts, and publishes where they are.

All state is soft: servers tell who they are and what they hold with every heartbeat, so a
directory that starts anew knows all after a few of them. Nothing waits for it but changes.
Knows no processes and no sockets; whoever runs it calls `tick` a few times a second.
"""

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cluster.experts.placement import Held, Server, imbalance, place, share
from cluster.experts.table import Assignment, Report, RoutingTable, ServerAddress, Unit

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 0.5
DEAD_AFTER_SECONDS = 3.0
SETTLE_SECONDS = 2.0
"""Before the first placement: servers that start together should not load what others will hold."""
REBALANCE_SECONDS = 3.0
LOAD_SECONDS = 5.0
"""Load is an average over about so long."""
UNEVEN = 1.05
"""Imbalance of the copies that there are, were their rows divided as evenly as can be, above which some move."""
FEWEST_ROWS = 20.0
"""Of a layer and expert on average; with fewer the load is noise, and nothing moves for it."""
SPARE = 1.125
"""Room for copies beyond `copies` of each expert, where the memory is not given."""


@dataclass
class _Member:
    address: ServerAddress
    seen: float
    holds: frozenset[Unit]
    max_units: int | None
    is_leaving: bool = False
    hold: frozenset[Unit] = frozenset()
    named: frozenset[Unit] = frozenset()
    rows: dict[Unit, float] = field(default_factory=dict)


class Directory:
    """Of the experts of one model. Safe to use from several threads.

    layers: those that have experts. copies: fewest of each expert while there are as many servers.
    """

    def __init__(
        self, layers: Sequence[int], num_experts: int, copies: int = 2, clock: Callable[[], float] = time.monotonic,
        first_epoch: int | None = None,
    ) -> None:  # fmt: skip
        self._layers, self._num_experts, self._copies, self._clock = tuple(layers), num_experts, copies, clock
        self._lock = threading.Lock()
        self._members: dict[str, _Member] = {}
        self._loads = dict.fromkeys(self._layers, np.zeros(num_experts))
        # A directory that replaces a dead one must go on above its epochs.
        self._epoch = int(time.time() * 1000) if first_epoch is None else first_epoch
        self._table: RoutingTable | None = None
        self._is_dirty, self._is_outdated = True, False
        """Whether experts are to be placed anew, and whether the table is no longer what servers hold."""
        self._joined = clock()
        self._decayed = self._rebalanced = clock()

    @property
    def table(self) -> RoutingTable | None:
        """None before the first placement."""
        return self._table

    def report(self, report: Report) -> Assignment:
        """A heartbeat."""
        with self._lock:
            now = self._clock()
            member = self._members.get(report.address.id)
            if member is None:
                logger.info("expert server %s on %s joins", report.address.id, report.address.host)
                hold = frozenset() if self._table is None else report.holds
                member = _Member(report.address, now, report.holds, report.max_units, hold=hold)
                self._members[report.address.id] = member
                self._is_dirty, self._joined = True, now
            if report.is_leaving and not member.is_leaving:
                logger.info("expert server %s leaves", report.address.id)
                member.is_leaving = self._is_dirty = True
            self._count(member, report.rows, now)
            self._is_outdated |= member.holds != report.holds
            member.seen, member.holds = now, report.holds
            if all(
                other.is_leaving for other in self._members.values()
            ):  # nobody takes over: there is no point in waiting
                return Assignment(frozenset(), frozenset(), self._epoch)
            if self._table is None:  # nothing is decided yet: keep what is there
                return Assignment(report.holds, report.holds)
            return Assignment(member.hold, member.named, self._epoch)

    def tick(self) -> None:
        """Drops servers that are silent, places experts anew where that is due, publishes what has changed."""
        with self._lock:
            now = self._clock()
            self._drop_silent(now)
            is_first = self._table is None
            if not self._members or (is_first and now - self._joined < SETTLE_SECONDS):
                return
            uneven = []
            if not is_first and now - self._rebalanced >= REBALANCE_SECONDS:
                self._rebalanced = now
                uneven = [layer for layer in self._layers if self._is_uneven(layer)]
            todo = self._layers if self._is_dirty else uneven
            staying = [member for member in self._members.values() if not member.is_leaving]
            previous = {layer: self._held(layer, staying) for layer in todo}
            loads = {layer: self._certain(layer) for layer in todo}
            self._is_dirty = False
        placed = {}
        if todo and staying:
            if todo is self._layers and len(staying) < self._copies:
                logger.warning(
                    "%d expert servers cannot hold %d copies of each expert: a death will make steps wait",
                    len(staying), self._copies,
                )  # fmt: skip
            servers = self._servers(staying)
            placed = {layer: place(loads[layer], servers[layer], previous[layer], self._copies) for layer in todo}
        with self._lock:
            self._assign(placed)
            if placed or (self._is_outdated and not is_first):
                self._publish()

    def imbalances(self) -> dict[int, float]:
        """Rows of the busiest server over the mean, lately, by layer."""
        with self._lock:
            serving = [member for member in self._members.values() if not member.is_leaving]
            by_layer = {}
            for layer in self._layers:
                units = [(layer, expert) for expert in range(self._num_experts)]
                by_layer[layer] = imbalance([sum(member.rows.get(unit, 0.0) for unit in units) for member in serving])
            return by_layer

    def copies(self) -> dict[Unit, int]:
        """How many servers the table names for each expert."""
        table = self._table
        if table is None:
            return {}
        layers = table.layers.items()
        return {(layer, e): len(holders) for layer, experts in layers for e, holders in enumerate(experts)}

    def named(self) -> dict[str, int]:
        """For how many experts the table names a server; those that it asks for none are left out."""
        table = self._table
        if table is None:
            return {}
        of_all = Counter(place for experts in table.layers.values() for holders in experts for place in holders)
        return {table.servers[column].id: count for column, count in of_all.items()}

    def members(self) -> dict[str, tuple[ServerAddress, int, int, bool]]:
        """Address, units held, units assigned, whether it leaves: of every live server."""
        with self._lock:
            return {
                name: (member.address, len(member.holds), len(member.hold), member.is_leaving)
                for name, member in self._members.items()
            }

    def _drop_silent(self, now: float) -> None:
        for name in [name for name, member in self._members.items() if now - member.seen > DEAD_AFTER_SECONDS]:
            logger.warning("expert server %s is silent for %.1f s: dropped", name, now - self._members[name].seen)
            del self._members[name]
            self._is_dirty = True

    def _count(self, member: _Member, rows: Mapping[Unit, int], now: float) -> None:
        keep = math.exp(-(now - self._decayed) / LOAD_SECONDS)
        self._decayed = now
        for layer in self._layers:
            self._loads[layer] = self._loads[layer] * keep
        for other in self._members.values():
            other.rows = {unit: count * keep for unit, count in other.rows.items() if count > 0.5}
        for (layer, expert), count in rows.items():
            self._loads[layer][expert] += count
            member.rows[layer, expert] = member.rows.get((layer, expert), 0.0) + count

    def _is_uneven(self, layer: int) -> bool:
        assert self._table is not None
        loads = self._loads[layer]
        if loads.mean() < FEWEST_ROWS:
            return False
        holds = np.zeros((self._num_experts, len(self._table.servers)), np.bool_)
        for expert, holders in enumerate(self._table.layers[layer]):
            holds[expert, list(holders)] = True
        return imbalance(share(loads, holds).sum(0)) > UNEVEN

    def _certain(self, layer: int) -> NDArray[np.float64]:
        """Load of the layer's experts, taken to be alike as far as little has been seen of them."""
        return self._loads[layer] + max(FEWEST_ROWS - float(self._loads[layer].mean()), 0.0)

    def _held(self, layer: int, members: Sequence[_Member]) -> Held:
        """What servers are meant to hold, or do hold where nothing was meant yet."""
        held = {member.address.id: member.hold or member.holds for member in members}
        return {name: frozenset(e for unit_layer, e in units if unit_layer == layer) for name, units in held.items()}

    def _servers(self, members: Sequence[_Member]) -> dict[int, list[Server]]:
        """Room by layer: as much as memory allows, or enough for `copies` of everything and some more."""
        enough = math.ceil(self._copies * SPARE * self._num_experts / len(members))
        servers: dict[int, list[Server]] = {}
        for place_of_layer, layer in enumerate(self._layers):
            servers[layer] = []
            for member in members:
                slots = enough
                if member.max_units is not None:
                    each, rest = divmod(member.max_units, len(self._layers))
                    slots = each + (place_of_layer < rest)
                slots = min(slots, self._num_experts)
                servers[layer].append(Server(member.address.id, member.address.host, slots))
        return servers

    def _assign(self, placed: Mapping[int, Held]) -> None:
        for name, member in self._members.items():
            others = frozenset(unit for unit in member.hold if unit[0] not in placed)
            mine = {(layer, e) for layer, held in placed.items() for e in held.get(name, frozenset())}
            member.hold = others | mine if not member.is_leaving else frozenset()

    def _publish(self) -> None:
        """The table of what is assigned and there, and of other copies where that is not enough yet.

        Takes some 0.1 s for thousands of experts, which is why heartbeats only note that it is due.
        """
        self._is_outdated = False
        members = list(self._members.values())
        layers = {layer: self._holders_of(layer, members) for layer in self._layers}
        servers = tuple(member.address for member in members)
        table = self._table
        if table is not None and (table.servers, table.layers) == (servers, layers):
            return
        self._epoch += 1
        self._table = RoutingTable(self._epoch, servers, layers)
        for column, member in enumerate(members):
            member.named = frozenset(
                (layer, e)
                for layer, experts in layers.items()
                for e, holders in enumerate(experts)
                if column in holders
            )

    def _holders_of(self, layer: int, members: Sequence[_Member]) -> tuple[tuple[int, ...], ...]:
        holders: list[tuple[int, ...]] = []
        for expert in range(self._num_experts):
            unit = (layer, expert)
            there = [column for column, member in enumerate(members) if unit in member.holds]
            meant = [column for column in there if unit in members[column].hold]
            # What leaves is named only until those that are to hold the expert do, however few they are.
            wanted = max(1, min(self._copies, sum(unit in member.hold for member in members)))
            others = sorted(set(there) - set(meant), key=lambda column: (members[column].is_leaving, column))
            holders.append(tuple(sorted(meant + others[: max(0, wanted - len(meant))])))
        return tuple(holders)
