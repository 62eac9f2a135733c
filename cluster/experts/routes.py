"""Where the rows of a step go: copies of an expert get them in the proportions of the table.

Each step gives an expert's rows to the copy that is furthest behind its share, less what its server has in this
step already: over some time shares are kept, and within a step servers are about even. (Drift plus penalty:
Neely, "Stochastic Network Optimization", 2010.) Clients do not know of each other; that their sum is even,
too, is what the shares are for. Few rows of an expert stay together: its weights are read once, which is what a step
of decoding costs. Many, as of a long prompt, are divided, since one server should not work while others wait.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cluster.experts.table import Copy

ROWS_TOGETHER = 64
"""Of an expert, no fewer are divided: reading its weights once more is then little beside computing."""
_KEEP = 0.98
"""Of what copies were given, so much still counts the next time: it is forgotten over some fifty steps."""


class Segment(NamedTuple):
    """Rows `start` to `stop` of the sorted ones, which go to `server`."""

    server: int
    start: int
    stop: int
    experts: list[int]
    counts: list[int]

    @property
    def num_rows(self) -> int:
        return self.stop - self.start

    def overlaps(self, other: "Segment") -> bool:
        return self.start < other.stop and other.start < self.stop


class Balance:
    """Deals the rows of one layer to servers. copies: of each expert; usable: whether a server is, by place."""

    def __init__(self, copies: Sequence[Sequence[Copy]], usable: Sequence[bool]) -> None:
        self._copies = [_normalized([copy for copy in of if usable[copy.server]]) for of in copies]
        self._owed = [[0.0] * len(of) for of in self._copies]
        """Rows by which each copy is behind its share."""

    def deal(self, experts: NDArray[np.int64]) -> tuple[NDArray[np.int64], list[Segment]]:
        """experts: int64 [k], of each row -> the order that sorts rows by server and expert, and each server's part.

        Rows whose expert has no server are in a segment of server -1.
        """
        counts = np.bincount(experts, minlength=len(self._copies))
        by_expert, next_row = experts.argsort(kind="stable"), (counts.cumsum() - counts).tolist()
        pieces: list[NDArray[np.int64]] = []
        segments: list[Segment] = []
        start = 0
        for (server, expert), count in sorted(self._choose(counts.tolist()).items()):
            stop = start + count
            pieces.append(by_expert[next_row[expert] : next_row[expert] + count])
            next_row[expert] += count
            if segments and segments[-1].server == server:
                last = segments[-1]
                last.experts.append(expert)
                last.counts.append(count)
                segments[-1] = last._replace(stop=stop)
            else:
                segments.append(Segment(server, start, stop, [expert], [count]))
            start = stop
        return (np.concatenate(pieces) if pieces else by_expert), segments

    def _choose(self, counts: list[int]) -> Counter[tuple[int, int]]:
        """How many rows go to which (server, expert). Experts with most rows come first."""
        taken: Counter[int] = Counter()
        chosen: Counter[tuple[int, int]] = Counter()
        for count, expert in sorted(((count, expert) for expert, count in enumerate(counts) if count), reverse=True):
            copies = self._copies[expert]
            owed = [_KEEP * rows + copy.share * count for rows, copy in zip(self._owed[expert], copies, strict=True)]
            parts = max(1, min(len(copies), count // ROWS_TOGETHER))
            for part in range(parts):
                size = count * (part + 1) // parts - count * part // parts
                server = -1
                if copies:
                    best = max(range(len(copies)), key=lambda i: owed[i] - taken[copies[i].server])
                    server = copies[best].server
                    owed[best] -= size
                taken[server] += size
                chosen[server, expert] += size
            self._owed[expert] = owed
        return chosen


def _normalized(copies: list[Copy]) -> list[Copy]:
    """With shares that add up to one."""
    total = sum(copy.share for copy in copies)
    return [Copy(copy.server, copy.share / total if total else 1 / len(copies)) for copy in copies]
