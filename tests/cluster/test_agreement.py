"""Ranks take over what the first of their stage thinks that servers were given."""

from array import array
from types import SimpleNamespace

import pytest

from cluster.agreement import STEPS, Agreement
from cluster.parallel import Layout, Rendezvous, World
from tests.cluster.ranks import on_ranks

Given = list[list[float]]
"""By layer and server."""


def run_rank(rank: int, layout: Layout, address: str, given: list[Given]) -> tuple[Given, Given]:
    """What this rank thinks a step before the ranks agree, and after that."""
    agreement = Agreement(World(layout, rank, address, start_seconds=60))
    layers = [SimpleNamespace(is_whole=True, given=array("d", rows)) for rows in given[rank]]
    of_layer = agreement.guard(layers.__getitem__)
    for layer in range(len(layers)):
        of_layer(layer)
    found = []
    for steps in (STEPS - 1, 1):
        assert [agreement.reach() for _ in range(steps)] == [""] * steps
        found.append([layer.given.tolist() for layer in layers])
    return found[0], found[1]


@pytest.mark.parametrize("hosts", [["here"] * 4, ["one", "one", "other", "other"], ["one", "other"] * 2])
def test_ranks_of_a_stage_are_of_one_mind_again(hosts: list[str]) -> None:
    given = [[[10.0 * rank + layer, 0.5] for layer in range(3)] for rank in range(4)]
    layout, rendezvous = Layout(2, 2, tuple(hosts)), Rendezvous()
    try:
        before, after = zip(*on_ranks(4, run_rank, layout, rendezvous.address, given), strict=True)
    finally:
        rendezvous.close()
    assert list(before) == given
    assert list(after) == [given[0], given[0], given[2], given[2]]


def test_one_that_knows_of_another_number_of_servers_keeps_what_it_thinks() -> None:
    given = [[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0, 7.0], [8.0, 9.0, 10.0]], [[9.0, 9.0], [9.0, 9.0]]]
    layout, rendezvous = Layout(3, 1, ("here",) * 3), Rendezvous()
    try:
        after = [rows for _, rows in on_ranks(3, run_rank, layout, rendezvous.address, given)]
    finally:
        rendezvous.close()
    assert after == [given[0], given[1], given[0]]
