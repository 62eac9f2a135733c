"""Where the rows of a step go: each expert's to the copy on the server that was given least of the layer lately.

That evens out servers whatever the loads are, as far as placement allows. (Hajek, "Performance of global load
balancing by local adjustment", 1990.) It takes all rows of the layer to know what servers were given: tensor-parallel
ranks, which send an expert's rows from one of them only, all deal the rows of all, alike, and send their own. (A table
that one takes a step later than another, or a server silent to one of them, sets them apart: agreement.py.)
Clients of different engines do not know of each other; where each is even, so is their sum.

Few rows of an expert stay together: its weights are read once, which is what a step of decoding costs. Many, as of a
long prompt, are divided, since one server should not work while others wait.
"""

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

ROWS_TOGETHER = 32
"""Of an expert, so many at least stay together: reading its weights once more is then little beside computing."""
KEEP = 0.98
"""Of what servers were given, so much still counts the next time: it is forgotten over some fifty deals."""


@dataclass(slots=True)
class Segment:
    """Rows `start` to `stop` of the sorted ones, which go to `server`: `counts[i]` rows of `experts[i]` in turn."""

    server: int
    start: int
    stop: int
    experts: list[int]
    counts: list[int]

    def add(self, expert: int, count: int) -> None:
        self.stop += count
        self.experts.append(expert)
        self.counts.append(count)

    @property
    def num_rows(self) -> int:
        return self.stop - self.start

    def overlaps(self, other: "Segment") -> bool:
        return self.start < other.stop and other.start < self.stop


class Balance:
    """Deals the rows of one layer to servers.

    holders: places of each expert's servers; usable: whether a server is, by place; before: the balance that this one
    replaces, of the same servers unless it was told to `forget`: what they were given still counts.
    """

    def __init__(
        self, holders: Sequence[Sequence[int]], usable: Sequence[bool], before: "Balance | None" = None
    ) -> None:
        servers = [[server for server in of if usable[server]] or [-1] for of in holders]
        self.is_whole = all(of[0] >= 0 for of in servers)
        """Whether every expert has a server."""
        self.first = array("q", [0, *accumulate(map(len, servers))])
        """Servers of expert e are those from first[e] to first[e + 1]; fast_path.cpp reads and writes all these."""
        self.servers = array("q", [server for of in servers for server in of])
        self.given = array("d", [0.0] * (len(usable) + 1))
        """Rows of late, by server; the last is of server -1."""
        if before is not None:
            self.given = before.given or self.given

    @property
    def num_experts(self) -> int:
        return len(self.first) - 1

    def forget(self) -> None:
        """Places are other servers from now on."""
        self.given = array("d")

    def deal(
        self, experts: NDArray[np.int64], routed: NDArray[np.int64] | None = None
    ) -> tuple[NDArray[np.int64], list[Segment]]:
        """experts: int64 [k], of each row -> the order that sorts rows by server and expert, and each server's part.

        routed: experts of all rows of the step, where others send some: those of experts of which there is none here.
        Rows whose expert has no server are in a segment of server -1.
        """
        counts = np.bincount(experts, minlength=self.num_experts).tolist()
        dealt = counts if routed is None else np.bincount(routed, minlength=self.num_experts).tolist()
        by_expert, next_row = experts.argsort(kind="stable"), [0, *accumulate(counts)]
        pieces: list[NDArray[np.int64]] = []
        segments: list[Segment] = []
        start = 0
        for server, expert, count in sorted(part for part in self._choose(dealt) if counts[part[1]]):
            pieces.append(by_expert[next_row[expert] : next_row[expert] + count])
            next_row[expert] += count
            if not segments or segments[-1].server != server:
                segments.append(Segment(server, start, start, [], []))
            segments[-1].add(expert, count)
            start += count
        return (np.concatenate(pieces) if pieces else by_expert), segments

    def _choose(self, counts: list[int]) -> list[tuple[int, int, int]]:
        """(server, expert, rows) for every part of an expert's rows. Experts with most rows come first."""
        given = self.given
        for server, rows in enumerate(given):
            given[server] = KEEP * rows
        chosen: Counter[tuple[int, int]] = Counter()
        for count, expert in sorted([(count, expert) for expert, count in enumerate(counts) if count], reverse=True):
            servers = self.servers[self.first[expert] : self.first[expert + 1]]
            parts = max(1, count // ROWS_TOGETHER)
            for part in range(parts):
                size = count * (part + 1) // parts - count * part // parts
                server = min(servers, key=given.__getitem__)
                given[server] += size
                chosen[server, expert] += size
        return [(server, expert, rows) for (server, expert), rows in chosen.items()]
