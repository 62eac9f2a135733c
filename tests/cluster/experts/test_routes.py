"""Turns: copies get their shares, servers are even within a turn, rows are cut where the server changes."""

from collections import Counter

import numpy as np

from cluster.experts.routes import turns
from cluster.experts.table import Copy

PAIRS = [(0, 1), (2, 3), (0, 2), (1, 3), (0, 3), (1, 2), (0, 1), (2, 3)]
COPIES = [[Copy(a, 0.5), Copy(b, 0.5)] for a, b in PAIRS]


def server_of(turn, expert):
    return turn.server_at[turn.position[expert]]


def test_copies_take_turns_and_servers_are_even():
    all_turns = turns(COPIES, [True] * 4)
    for expert, pair in enumerate(PAIRS):
        assert Counter(server_of(turn, expert) for turn in all_turns) == dict.fromkeys(pair, len(all_turns) // 2)
    for turn in all_turns:
        assert max(Counter(turn.server_at).values()) <= 3


def test_shares_are_kept():
    copies = [[Copy(0, 0.75), Copy(1, 0.25)], [Copy(0, 0.0), Copy(1, 1.0)]]
    all_turns = turns(copies, [True, True])
    assert Counter(server_of(turn, 0) for turn in all_turns) == {0: 6, 1: 2}
    assert {server_of(turn, 1) for turn in all_turns} == {1}


def test_servers_that_cannot_be_used_get_nothing():
    for turn in turns(COPIES, [False, True, True, True]):
        assert 0 not in turn.server_at
    for turn in turns(COPIES, [False, False, True, True]):
        assert server_of(turn, 0) == -1
        assert server_of(turn, 2) == 2


def test_segments_cover_all_rows_once_and_go_to_holders():
    experts = np.array([3, 1, 1, 7, 0, 3, 3, 5])
    for turn in turns(COPIES, [True] * 4):
        order, segments = turn.segments(experts)
        assert sorted(order.tolist()) == list(range(8))
        assert [segment.start for segment in segments] == [0, *(segment.stop for segment in segments[:-1])]
        assert segments[-1].stop == 8
        for segment in segments:
            rows = experts[order[segment.start : segment.stop]].tolist()
            assert rows == [e for e, n in zip(segment.experts, segment.counts, strict=True) for _ in range(n)]
            assert all(segment.server in PAIRS[expert] for expert in rows)
        assert len({segment.server for segment in segments}) == len(segments)
