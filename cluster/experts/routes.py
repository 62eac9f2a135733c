"""From a routing table to where each row goes: arrays that a step reads without thinking.

Copies of an expert take turns, step by step, in the proportions of the table. All rows that an
expert has in a step go to one copy: its weights are read once, which is what a step of decoding costs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cluster.experts.table import Copy

TURNS = 8


class Segment(NamedTuple):
    """Rows `start` to `stop` of the sorted ones, which go to `server`."""

    server: int
    start: int
    stop: int
    experts: list[int]
    counts: list[int]

    def overlaps(self, other: "Segment") -> bool:
        return self.start < other.stop and other.start < self.stop


@dataclass(frozen=True)
class Turn:
    """One way of dividing a layer's experts over servers.

    position: int64 [experts], of each expert when they are sorted by server.
    expert_at: the inverse. server_at: int64 [experts], the server at each position, -1 for none.
    """

    position: NDArray[np.int64]
    expert_at: list[int]
    server_at: list[int]

    def segments(self, experts: NDArray[np.int64]) -> tuple[NDArray[np.int64], list[Segment]]:
        """experts: int64 [k] -> the order that sorts them by server and expert, and each server's part of it."""
        positions = self.position[experts]
        order = positions.argsort(kind="stable")
        segments: list[Segment] = []
        start = 0
        for at, count in enumerate(np.bincount(positions, minlength=len(self.expert_at)).tolist()):
            if not count:
                continue
            server, stop = self.server_at[at], start + count
            if segments and segments[-1].server == server:
                last = segments[-1]
                last.experts.append(self.expert_at[at])
                last.counts.append(count)
                segments[-1] = last._replace(stop=stop)
            else:
                segments.append(Segment(server, start, stop, [self.expert_at[at]], [count]))
            start = stop
        return order, segments


def turns(copies: Sequence[Sequence[Copy]], usable: Sequence[bool], num_turns: int = TURNS) -> list[Turn]:
    """How the rows of a layer go, turn by turn. copies: of each expert; usable: whether a server is, by place.

    Over all turns each copy gets about its share; within a turn the servers' loads are kept even, taking experts
    to have equal loads.
    """
    left = [[(copy.server, copy.share) for copy in of if usable[copy.server]] for of in copies]
    given = [dict.fromkeys((server for server, _ in of), 0.0) for of in left]
    result = []
    for turn in range(1, num_turns + 1):
        taken = dict.fromkeys(range(len(usable)), 0)
        chosen = [-1] * len(copies)
        for expert in sorted(range(len(left)), key=lambda e: len(left[e])):
            if left[expert]:
                total = sum(share for _, share in left[expert]) or 1.0
                owed = {
                    server: round(turn * (share / total if total else 1.0) - given[expert][server], 6)
                    for server, share in left[expert]
                }
                # A copy may run ahead of its share by up to one turn where that keeps this turn even.
                due = [server for server, amount in owed.items() if amount > 0] or list(owed)
                server = min(due, key=lambda s: (taken[s], -owed[s], (s + expert) % len(usable)))
                chosen[expert] = server
                given[expert][server] += 1.0
                taken[server] += 1
        result.append(_turn(chosen))
    return result


def _turn(chosen: list[int]) -> Turn:
    expert_at = sorted(range(len(chosen)), key=lambda expert: (chosen[expert], expert))
    position = np.empty(len(chosen), np.int64)
    position[expert_at] = np.arange(len(chosen))
    return Turn(position, expert_at, [chosen[expert] for expert in expert_at])
