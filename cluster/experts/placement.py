"""Which server holds which experts: a pure function, one layer at a time.

Worked example. Four experts, of which the first gets half of all tokens; three servers on three
hosts, with room for three experts each; two copies of each expert are wanted:

>>> servers = [Server(name, host=name, slots=3) for name in "abc"]
>>> held = place([6.0, 2.0, 2.0, 2.0], servers)
>>> {name: sorted(experts) for name, experts in held.items()}
{'a': [0, 1, 3], 'b': [1, 2, 3], 'c': [0, 2]}
>>> [round(float(load), 2) for load in server_loads([6.0, 2.0, 2.0, 2.0], held)]
[4.0, 4.0, 4.0]

Server c dies. Its experts get their second copies on the servers that are left, and nothing moves:

>>> held = place([6.0, 2.0, 2.0, 2.0], [Server(name, host=name, slots=4) for name in "ab"], held)
>>> {name: sorted(experts) for name, experts in held.items()}
{'a': [0, 1, 2, 3], 'b': [0, 1, 2, 3]}

In order of importance: every expert once; every expert `copies` times, on distinct servers, and on
distinct hosts where there are enough; what is held already stays; further copies and exchanges where
they even out the load. DeepSeek's EPLB (https://github.com/deepseek-ai/EPLB) has the last of these
only, and leaves half of the experts with one copy.

Copies of an expert are taken to share its rows in the proportions of `share`, which makes the fullest
server as little full as the placement allows. Clients come near that without being told (routes.py).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Held = dict[str, frozenset[int]]
"""Server id -> the experts of one layer that it holds."""

Loads = Sequence[float] | NDArray[np.float64]
"""Of each expert, in any unit."""

EVEN_ENOUGH = 1.05
"""Imbalance below which nothing is moved or copied to even out the load."""

_MOST_CHANGES = 16
_CONSIDERED = 4
_ROUNDS = 12


@dataclass(frozen=True)
class Server:
    """slots: how many experts of the layer it has room for."""

    id: str
    host: str
    slots: int


class _Copy(NamedTuple):
    """A copy to add at `target`. `dropped` leaves `target` for it; `back` is where that goes, if anywhere."""

    expert: int
    target: int
    dropped: int | None = None
    back: int | None = None


def place(
    loads: Loads, servers: Sequence[Server], previous: Mapping[str, frozenset[int]] | None = None,
    copies: int = 2,
) -> Held:  # fmt: skip
    """What each server should hold.

    loads: all zero is as good as all equal.
    previous: what servers hold now, those that are gone included.
    """
    if not servers:
        return {}
    expected = _positive(loads)
    best = _Layer(expected, servers, previous or {})
    best.settle(_equal_counts(expected, servers, copies))
    if best.imbalance() > EVEN_ENOUGH:
        counts = _counts_by_load(expected, servers, copies)
        for start in (best.held(), {}):  # what is there already comes first, a clean slate last
            other = _Layer(expected, servers, start)
            other.settle(counts)
            if other.imbalance() < 0.98 * best.imbalance():
                best = other
    return best.held()


def imbalance(server_loads: Loads) -> float:
    """Load of the fullest server over the mean; 1 is even."""
    mean = float(np.mean(server_loads)) if len(server_loads) else 0.0
    return float(np.max(server_loads)) / mean if mean else 1.0


def server_loads(loads: Loads, held: Mapping[str, frozenset[int]]) -> NDArray[np.float64]:
    """Load of each server when copies share as `share` says: float64 [servers], in the order of `held`."""
    return share(_positive(loads), _matrix(len(loads), held.values())).sum(0)


def share(
    loads: NDArray[np.float64], holds: NDArray[np.bool_], start: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """How the load of each expert is divided over its copies so that servers are even.

    Each expert in turn pours its load where it stands lowest, given all others. That descends on the sum of
    squares of the servers' loads, whose minimum also has the least maximum.
    loads: [experts]; holds: [experts, servers]; start: where to begin, such as the result for a similar `holds`.
    Returns [experts, servers]; rows without a copy are 0.
    """
    counts = np.maximum(holds.sum(1, keepdims=True), 1)
    shares = np.where(holds, loads[:, None] / counts, 0.0) if start is None else start * holds
    totals = shares.sum(0)
    where = [np.flatnonzero(row) for row in holds]
    for _ in range(_ROUNDS):
        before = float(totals.max(initial=0.0))
        for expert, at in enumerate(where):
            if len(at) > 1 or (len(at) and start is not None):
                others = totals[at] - shares[expert, at]
                poured = _pour(float(loads[expert]), others)
                shares[expert, at] = poured
                totals[at] = others + poured
        if before - float(totals.max(initial=0.0)) < 1e-4 * before:
            break
    return shares


def _equal_counts(loads: NDArray[np.float64], servers: Sequence[Server], copies: int) -> NDArray[np.int64]:
    """Copies of each expert: `copies`, or fewer for those with least load where there is no room."""
    counts = np.zeros(len(loads), np.int64)
    room = sum(min(server.slots, len(loads)) for server in servers)
    for _ in range(min(copies, len(servers))):
        more = np.argsort(-loads, kind="stable")[: room - int(counts.sum())]
        counts[more] += 1
    return counts


def _counts_by_load(loads: NDArray[np.float64], servers: Sequence[Server], copies: int) -> NDArray[np.int64]:
    """The same, and all room that is left goes, slot by slot, to whose copies have most to do (EPLB's rule)."""
    counts = _equal_counts(loads, servers, copies)
    room = sum(min(server.slots, len(loads)) for server in servers)
    for _ in range(room - int(counts.sum())):
        burden = np.where(counts < len(servers), loads / np.maximum(counts, 1), -1.0)
        counts[burden.argmax()] += 1
    return counts


def _pour(amount: float, levels: NDArray[np.float64]) -> NDArray[np.float64]:
    """How much of `amount` goes onto each of `levels` when it fills up the lowest ones first."""
    if len(levels) == 2:  # nearly all experts, nearly always
        first = min(max((amount + levels[1] - levels[0]) / 2, 0.0), amount)
        return np.array([first, amount - first])
    ordered = np.sort(levels)
    surface = (amount + np.cumsum(ordered)) / np.arange(1, len(levels) + 1)
    return np.maximum(surface[np.flatnonzero(surface >= ordered)[-1]] - levels, 0.0)


def _positive(loads: Loads) -> NDArray[np.float64]:
    """An expert that nobody asked for lately still counts for a little: it may be asked for next."""
    values = np.asarray(loads, dtype=np.float64)
    least = 0.01 * values.mean() if values.any() else 1.0
    return np.maximum(values, least)


def _matrix(num_experts: int, held: Iterable[frozenset[int]]) -> NDArray[np.bool_]:
    columns = [[expert in experts for expert in range(num_experts)] for experts in held]
    return np.array(columns, dtype=np.bool_).reshape(-1, num_experts).T


class _Layer:
    """A placement in the making. `holds`: bool [experts, servers]."""

    def __init__(
        self, loads: NDArray[np.float64], servers: Sequence[Server], previous: Mapping[str, frozenset[int]]
    ) -> None:
        self.loads, self.servers = loads, servers
        hosts = sorted({server.host for server in servers})
        self.host = np.array([hosts.index(server.host) for server in servers])
        self.slots = np.array([server.slots for server in servers])
        self.holds = _matrix(len(loads), [previous.get(server.id, frozenset()) for server in servers])

    def held(self) -> Held:
        return {
            server.id: frozenset(np.flatnonzero(self.holds[:, column]).tolist())
            for column, server in enumerate(self.servers)
        }

    def imbalance(self) -> float:
        return imbalance(share(self.loads, self.holds).sum(0))

    def settle(self, counts: NDArray[np.int64]) -> None:
        """Goes from what is held to at least `counts` copies of each expert, evenly loaded."""
        self._trim(counts)
        for copy in range(1, int(counts.max(initial=0)) + 1):
            self._repair(np.minimum(counts, copy))
        if counts.max(initial=0) > 1:
            self._spread(counts)
            self._even_out(counts)

    def _trim(self, counts: NDArray[np.int64]) -> None:
        """Takes from servers that hold too much, first what has most copies beyond `counts`."""
        for column in np.flatnonzero(self.holds.sum(0) > self.slots):
            while self.holds[:, column].sum() > self.slots[column]:
                here = np.flatnonzero(self.holds[:, column])
                beyond = self.holds[here].sum(1) - counts[here]
                self.holds[here[np.lexsort((self.loads[here], -beyond))[0]], column] = False

    def _repair(self, counts: NDArray[np.int64]) -> None:
        """Gives experts of fewer than `counts` copies one more, those with most load by copy first."""
        for expert in np.argsort(-self.loads / np.maximum(counts, 1), kind="stable"):
            if self.holds[expert].sum() < counts[expert]:
                self._add(expert, counts, self._not_on_its_hosts(expert)) or self._add(
                    expert, counts, ~self.holds[expert]
                )

    def _spread(self, counts: NDArray[np.int64]) -> None:
        """Moves a copy when all of an expert's are on one host and there are several hosts."""
        if len(set(self.host)) < 2:
            return
        for expert in range(len(self.loads)):
            columns = np.flatnonzero(self.holds[expert])
            if len(columns) >= 2 and len(set(self.host[columns])) == 1:
                fullest = columns[np.argmax(self.holds[:, columns].sum(0))]
                self.holds[expert, fullest] = False
                if not self._add(expert, counts, (self.host != self.host[fullest]) & ~self.holds[expert]):
                    self.holds[expert, fullest] = True

    def _even_out(self, counts: NDArray[np.int64]) -> None:
        """Adds and exchanges copies while that makes the servers clearly more even."""
        shares = share(self.loads, self.holds)
        for _ in range(_MOST_CHANGES * len(self.servers)):
            if imbalance(shares.sum(0)) < EVEN_ENOUGH:
                return
            for change in self._changes(shares, counts):
                holds = self._after(change)
                tried = share(self.loads, holds, np.where(holds, shares, 0.0))
                if (tried.sum(0) ** 2).sum() < 0.999 * (shares.sum(0) ** 2).sum():
                    self.holds, shares = holds, tried
                    break
            else:
                return

    def _not_on_its_hosts(self, expert: int) -> NDArray[np.bool_]:
        return ~np.isin(self.host, self.host[self.holds[expert]])

    def _add(self, expert: int, counts: NDArray[np.int64], allowed: NDArray[np.bool_]) -> bool:
        """One more copy of `expert` on one of the `allowed` servers. False when there is no way."""
        fullness = self.holds.sum(0)
        weight = (self.loads / np.maximum(counts, 1)) @ self.holds
        # Among equals, the server that shares least with those that hold it: a death then burdens several others.
        together = self.holds @ self.holds[expert]
        shared = together @ self.holds.astype(np.int64)
        order = [int(column) for column in np.lexsort((shared, fullness, weight)) if allowed[column]]
        for column in order:
            if fullness[column] < self.slots[column]:
                self.holds[expert, column] = True
                return True
        for column in order:  # in the place of a copy that is more than was asked for
            surplus = np.flatnonzero(self.holds[:, column] & (self.holds.sum(1) > counts))
            if len(surplus):
                self.holds[surplus[np.argmin(self.loads[surplus])], column] = False
                self.holds[expert, column] = True
                return True
        for column in order:  # in the place of one that can go to a server with room
            for other in np.flatnonzero(fullness < self.slots):
                for moved in np.flatnonzero(self.holds[:, column] & ~self.holds[:, other]):
                    if self._keeps_hosts(int(moved), column, int(other)):
                        self.holds[moved, column], self.holds[moved, other] = False, True
                        self.holds[expert, column] = True
                        return True
        return False

    def _keeps_hosts(self, expert: int, source: int, target: int) -> bool:
        """Whether `expert` is on no fewer hosts after a copy went from `source` to `target`."""
        columns = np.flatnonzero(self.holds[expert]).tolist()
        after = [target if column == source else column for column in columns]
        return len(set(self.host[after])) >= len(set(self.host[columns]))

    def _keeps_hosts_without(self, expert: int, column: int) -> bool:
        hosts = self.host[self.holds[expert]]
        rest = np.delete(hosts, np.flatnonzero(hosts == self.host[column])[0])
        return len(set(rest)) > 1 or len(set(self.host)) == 1

    def _changes(self, shares: NDArray[np.float64], counts: NDArray[np.int64]) -> Iterator[_Copy]:
        """What might help the fullest server, the cheapest kinds first."""
        totals = shares.sum(0)
        full = int(totals.argmax())
        heavy = [int(e) for e in np.argsort(-shares[:, full], kind="stable")[:_CONSIDERED] if shares[e, full] > 0]
        surplus = self.holds.sum(1) > counts
        light = [int(column) for column in np.argsort(totals, kind="stable")[: 2 * _CONSIDERED] if column != full]
        pairs = [(expert, column) for expert in heavy for column in light if not self.holds[expert, column]]
        for expert, column in pairs:
            if self.holds[:, column].sum() < self.slots[column]:
                yield _Copy(expert, column)
        for expert, column in pairs:
            for dropped in self._lightest(np.where(surplus[:, None], shares, np.inf), column):
                if surplus[dropped] and self._keeps_hosts_without(dropped, column):
                    yield _Copy(expert, column, dropped)
        for expert, column in pairs:
            for dropped in self._lightest(shares, column):
                moves = self._keeps_hosts(expert, full, column) and self._keeps_hosts(dropped, column, full)
                if moves and not self.holds[dropped, full]:
                    yield _Copy(expert, column, dropped, full)

    def _lightest(self, shares: NDArray[np.float64], column: int) -> list[int]:
        here = np.flatnonzero(self.holds[:, column])
        return [int(expert) for expert in here[np.argsort(shares[here, column], kind="stable")][:_CONSIDERED]]

    def _after(self, change: _Copy) -> NDArray[np.bool_]:
        holds = self.holds.copy()
        holds[change.expert, change.target] = True
        if change.dropped is not None:
            holds[change.dropped, change.target] = False
        if change.back is not None:
            holds[change.dropped, change.back] = True
            holds[change.expert, change.back] = False
        return holds
