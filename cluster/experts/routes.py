"""Where the rows of a step go: copies of an expert get them in the proportions of the table.

Each step gives an expert's rows to the copy that is furthest behind its share, less what its server has in this
step already: over some time shares are kept, and within a step servers are about even. (Drift plus penalty:
Neely, "Stochastic Network Optimization", 2010.) Clients do not know of each other; that their sum is even,
too, is what the shares are for. Few rows of an expert stay together: its weights are read once, which is what a step
of decoding costs. Many, as of a long prompt, are divided, since one server should not work while others wait.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from cluster.experts.table import Copy

ROWS_TOGETHER = 64
"""Of an expert, no fewer are divided: reading its weights once more is then little beside computing."""
KEEP = 0.98
"""Of what copies were given, so much still counts the next time: it is forgotten over some fifty steps."""


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

    copies: of each expert; usable: whether a server is, by place; before: the balance that this one replaces. What
    that owed is still owed: tables follow each other by the second, and who starts anew favors the first copies.
    """

    def __init__(
        self, copies: Sequence[Sequence[Copy]], usable: Sequence[bool], before: "Balance | None" = None
    ) -> None:
        held = [_normalized([copy for copy in of if usable[copy.server]]) for of in copies]
        self.num_experts, self.num_servers = len(copies), len(usable)
        self.is_whole = all(held)
        """Whether every expert has a server."""
        self.first = array("q", [0, *accumulate(len(of) for of in held)])
        """Copies of expert e are those from first[e] to first[e + 1]; int64, as the next, and float64."""
        self.server = array("q", [copy.server for of in held for copy in of])
        self.share = array("d", [copy.share for of in held for copy in of])
        owed = {} if before is None else before._owed_by_expert_and_server()
        by_copy = [owed.get((expert, copy.server), 0.0) for expert, of in enumerate(held) for copy in of]
        self.owed = array("d", by_copy)
        """Rows by which each copy is behind its share."""

    def deal(self, experts: NDArray[np.int64]) -> tuple[NDArray[np.int64], list[Segment]]:
        """experts: int64 [k], of each row -> the order that sorts rows by server and expert, and each server's part.

        Rows whose expert has no server are in a segment of server -1.
        """
        counts = np.bincount(experts, minlength=self.num_experts).tolist()
        by_expert, next_row = experts.argsort(kind="stable"), [0, *accumulate(counts)]
        pieces: list[NDArray[np.int64]] = []
        segments: list[Segment] = []
        start = 0
        for server, expert, count in sorted(self._choose(counts)):
            pieces.append(by_expert[next_row[expert] : next_row[expert] + count])
            next_row[expert] += count
            if not segments or segments[-1].server != server:
                segments.append(Segment(server, start, start, [], []))
            segments[-1].add(expert, count)
            start += count
        return (np.concatenate(pieces) if pieces else by_expert), segments

    def _choose(self, counts: list[int]) -> list[tuple[int, int, int]]:
        """(server, expert, rows) for every part of an expert's rows. Experts with most rows come first."""
        taken = [0] * (self.num_servers + 1)  # the last is of server -1
        chosen = []
        for count, expert in sorted([(count, expert) for expert, count in enumerate(counts) if count], reverse=True):
            copies = range(self.first[expert], self.first[expert + 1])
            for copy in copies:
                self.owed[copy] = KEEP * self.owed[copy] + self.share[copy] * count
            parts = max(1, min(len(copies), count // ROWS_TOGETHER))
            for part in range(parts):
                size = count * (part + 1) // parts - count * part // parts
                server = -1
                if copies:
                    best = max(copies, key=lambda copy: self.owed[copy] - taken[self.server[copy]])
                    self.owed[best] -= size
                    server = self.server[best]
                taken[server] += size
                chosen.append((server, expert, size))
        return chosen

    def _owed_by_expert_and_server(self) -> dict[tuple[int, int], float]:
        of = [(expert, copy) for expert in range(self.num_experts) for copy in range(*self.first[expert : expert + 2])]
        return {(expert, self.server[copy]): self.owed[copy] for expert, copy in of}


def _normalized(copies: list[Copy]) -> list[Copy]:
    """With shares that add up to one."""
    total = sum(copy.share for copy in copies)
    return [Copy(copy.server, copy.share / total if total else 1 / len(copies)) for copy in copies]
