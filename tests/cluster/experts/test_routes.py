"""Dealing rows: whole experts to holders, servers even over time, long prompts divided, every row once."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cluster.experts.placement import share
from cluster.experts.routes import ROWS_TOGETHER, Balance
from cluster.experts.table import Copy

PAIRS = [(0, 1), (2, 3), (0, 2), (1, 3), (0, 3), (1, 2), (0, 1), (2, 3)]
COPIES = [[Copy(a, 0.5), Copy(b, 0.5)] for a, b in PAIRS]


def check(experts, order, segments):
    assert sorted(order.tolist()) == list(range(len(experts)))
    assert [segment.start for segment in segments] == [0, *(segment.stop for segment in segments[:-1])]
    assert sum(segment.num_rows for segment in segments) == len(experts)
    assert len({segment.server for segment in segments}) == len(segments)
    for segment in segments:
        rows = experts[order[segment.start : segment.stop]].tolist()
        assert rows == [e for e, n in zip(segment.experts, segment.counts, strict=True) for _ in range(n)]


@given(st.lists(st.integers(0, 7), min_size=1, max_size=400), st.lists(st.booleans(), min_size=4, max_size=4))
def test_every_row_goes_once_to_a_usable_holder_or_nowhere(experts, usable):
    experts = np.array(experts)
    balance = Balance(COPIES, usable)
    for _ in range(3):
        order, segments = balance.deal(experts)
        check(experts, order, segments)
        for segment in segments:
            for expert in segment.experts:
                holders = [server for server in PAIRS[expert] if usable[server]]
                assert segment.server in holders or (segment.server == -1 and not holders)


def test_shares_are_kept_by_rows_not_by_steps():
    copies = [[Copy(0, 0.75), Copy(1, 0.25)], [Copy(0, 0.0), Copy(1, 1.0)], [Copy(0, 0.0), Copy(1, 0.0)]]
    balance, given = Balance(copies, [True, True]), Counter()
    for step in range(400):
        experts = np.repeat([0, 1, 2], 1 if step % 20 else 40)  # decoding, and now and then a prompt
        for segment in balance.deal(experts)[1]:
            for expert, count in zip(segment.experts, segment.counts, strict=True):
                given[expert, segment.server] += count
    of = [given[expert, 0] / (given[expert, 0] + given[expert, 1]) for expert in range(3)]
    assert abs(of[0] - 0.75) < 0.05
    assert of[1] < 0.02
    assert abs(of[2] - 0.5) < 0.05


def test_shares_are_kept_over_tables_that_follow_each_other():
    """Four copies get equal parts even if every ninth step brings a new table."""
    copies, given, balance = [[Copy(server, 0.25) for server in range(4)]], Counter(), None
    for step in range(900):
        if step % 9 == 0:
            balance = Balance(copies, [True] * 4, balance)
        for segment in balance.deal(np.zeros(4, np.int64))[1]:
            given[segment.server] += segment.num_rows
    assert max(given.values()) < 1.02 * 900


def test_clients_that_ask_for_different_experts_are_even_together():
    """As tensor-parallel ranks do: each has every third expert."""
    loads = np.array([0.25, 0.02, 0.1, 0.2, 0.02, 0.25, 0.08, 0.08])
    held = np.array([[server in pair for server in range(4)] for pair in PAIRS])
    shares = share(loads, held)
    copies = [[Copy(s, shares[e, s]) for s in pair] for e, pair in enumerate(PAIRS)]
    ranks, servers, draw = [Balance(copies, [True] * 4) for _ in range(3)], Counter(), np.random.default_rng(0)
    for step in range(600):
        experts = draw.choice(8, 8 if step % 20 else 100, p=loads)
        for rank, balance in enumerate(ranks):
            for segment in balance.deal(experts[experts % 3 == rank])[1]:
                servers[segment.server] += segment.num_rows
    assert max(servers.values()) < 1.1 * sum(servers.values()) / 4


def test_few_rows_of_an_expert_stay_together_and_many_are_divided():
    few, many = np.zeros(2 * ROWS_TOGETHER - 1, np.int64), np.zeros(2 * ROWS_TOGETHER, np.int64)
    assert len(Balance(COPIES, [True] * 4).deal(few)[1]) == 1
    order, segments = Balance(COPIES, [True] * 4).deal(many)
    check(many, order, segments)
    assert [(segment.server, segment.num_rows) for segment in segments] == [(0, 64), (1, 64)]


def test_within_a_step_servers_are_even():
    for segment in Balance(COPIES, [True] * 4).deal(np.arange(8))[1]:
        assert segment.num_rows <= 3
