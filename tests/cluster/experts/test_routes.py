"""Dealing rows: whole experts to holders, servers even over time, long prompts divided, every row once."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cluster.experts.routes import ROWS_TOGETHER, Balance

PAIRS = [(0, 1), (2, 3), (0, 2), (1, 3), (0, 3), (1, 2), (0, 1), (2, 3)]


def check(experts, order, segments):
    assert sorted(order.tolist()) == list(range(len(experts)))
    assert [segment.start for segment in segments] == [0, *(segment.stop for segment in segments)][: len(segments)]
    assert sum(segment.num_rows for segment in segments) == len(experts)
    assert len({segment.server for segment in segments}) == len(segments)
    for segment in segments:
        rows = experts[order[segment.start : segment.stop]].tolist()
        assert rows == [e for e, n in zip(segment.experts, segment.counts, strict=True) for _ in range(n)]


@given(st.lists(st.integers(0, 7), min_size=1, max_size=400), st.lists(st.booleans(), min_size=4, max_size=4))
def test_every_row_goes_once_to_a_usable_holder_or_nowhere(experts, usable):
    experts = np.array(experts)
    balance = Balance(PAIRS, usable)
    for _ in range(3):
        order, segments = balance.deal(experts)
        check(experts, order, segments)
        for segment in segments:
            for expert in segment.experts:
                holders = [server for server in PAIRS[expert] if usable[server]]
                assert segment.server in holders or (segment.server == -1 and not holders)


def test_servers_are_even_by_rows_not_by_steps():
    copies = [[0, 1], [1], [0, 1]]
    balance, given = Balance(copies, [True, True]), Counter()
    for step in range(400):
        experts = np.repeat([0, 1, 2], 1 if step % 20 else 40)  # decoding, and now and then a prompt
        for segment in balance.deal(experts)[1]:
            given[segment.server] += segment.num_rows
    assert max(given.values()) < 1.05 * sum(given.values()) / 2


def test_servers_are_even_over_tables_that_follow_each_other():
    """Four copies get equal parts even if every ninth step brings a new table."""
    copies, given, balance = [list(range(4))], Counter(), None
    for step in range(900):
        if step % 9 == 0:
            balance = Balance(copies, [True] * 4, balance)
        for segment in balance.deal(np.zeros(4, np.int64))[1]:
            given[segment.server] += segment.num_rows
    assert max(given.values()) < 1.02 * 900


def test_what_was_given_to_other_servers_does_not_count():
    before = Balance([[0]], [True, True])
    before.deal(np.zeros(500, np.int64))
    before.forget()
    after, given = Balance([[1, 2]], [True] * 3, before), Counter()
    for _ in range(100):
        for segment in after.deal(np.zeros(1, np.int64))[1]:
            given[segment.server] += segment.num_rows
    assert given == {1: 50, 2: 50}


def rows_of_ranks(ranks, experts):
    """Of each server, when three tensor-parallel ranks each send every third expert and know of all."""
    rows = Counter()
    for rank, balance in enumerate(ranks):
        own = experts[experts % 3 == rank]
        order, segments = balance.deal(own, experts)
        check(own, order, segments)
        for segment in segments:
            rows[segment.server] += segment.num_rows
    return rows


def test_ranks_that_send_different_experts_are_even_together():
    loads = np.array([0.25, 0.02, 0.1, 0.2, 0.02, 0.25, 0.08, 0.08])
    ranks, servers, draw = [Balance(PAIRS, [True] * 4) for _ in range(3)], Counter(), np.random.default_rng(0)
    for step in range(600):
        servers += rows_of_ranks(ranks, draw.choice(8, 8 if step % 20 else 100, p=loads))
    assert max(servers.values()) < 1.02 * sum(servers.values()) / 4


def test_few_rows_of_an_expert_stay_together_and_many_are_divided():
    few, many = np.zeros(2 * ROWS_TOGETHER - 1, np.int64), np.zeros(2 * ROWS_TOGETHER, np.int64)
    assert len(Balance(PAIRS, [True] * 4).deal(few)[1]) == 1
    order, segments = Balance(PAIRS, [True] * 4).deal(many)
    check(many, order, segments)
    assert [(segment.server, segment.num_rows) for segment in segments] == [(0, ROWS_TOGETHER), (1, ROWS_TOGETHER)]


def test_within_a_step_servers_are_even():
    for segment in Balance(PAIRS, [True] * 4).deal(np.arange(8))[1]:
        assert segment.num_rows <= 3
