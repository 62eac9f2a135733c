"""Dealing rows: whole experts to holders, servers even over time, long prompts divided, every row once."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cluster.experts.routes import ROWS_TOGETHER, Balance
from cluster.experts.table import Copy

PAIRS = [(0, 1), (2, 3), (0, 2), (1, 3), (0, 3), (1, 2), (0, 1), (2, 3)]
COPIES = [[Copy(a, 0.5), Copy(b, 0.5)] for a, b in PAIRS]


def check(experts, order, segments):
    assert sorted(order.tolist()) == list(range(len(experts)))
    assert [segment.start for segment in segments] == [0, *(segment.stop for segment in segments)][: len(segments)]
    assert sum(segment.num_rows for segment in segments) == len(experts)
    assert len({segment.server for segment in segments}) == len(segments)
    for segment in segments:
        rows = experts[order[segment.start : segment.stop]].tolist()
        assert rows == [e for e, n in zip(segment.experts, segment.counts, strict=True) for _ in range(n)]


def given_to(servers, segments):
    for segment in segments:
        servers[segment.server] += segment.num_rows


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


def test_servers_become_even_though_experts_are_not():
    draw, servers = np.random.default_rng(0), Counter()
    balance = Balance(COPIES, [True] * 4)
    popular = np.array([0.4, 0.02, 0.02, 0.2, 0.02, 0.3, 0.02, 0.02])
    for step in range(300):
        experts = draw.choice(8, 8 if step % 20 else 100, p=popular)  # decoding, and now and then a prompt
        given_to(servers, balance.deal(experts)[1])
    assert max(servers.values()) < 1.05 * sum(servers.values()) / 4


def test_the_past_is_forgotten():
    """A server that could not be used much before does not get everything now."""
    balance = Balance(COPIES, [True] * 4)
    for _ in range(500):
        balance.deal(np.zeros(8, np.int64))  # servers 0 and 1 only
    servers = Counter()
    for _ in range(300):
        given_to(servers, balance.deal(np.arange(8))[1])
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
