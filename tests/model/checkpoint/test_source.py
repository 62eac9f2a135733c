import pytest
import torch

from model.checkpoint.source import Interleaved, Joined, Mapped


def test_a_joined_source_reads_as_the_concatenation():
    whole = torch.randn(7, 11)
    for dim, sizes in ((0, (3, 1, 3)), (1, (5, 6))):
        joined = Joined(tuple(Mapped(part) for part in whole.split(sizes, dim)), dim)
        assert joined.shape == (7, 11)
        for start in range(7):
            for stop in range(start + 1, 8):
                region = (slice(start, stop), slice(2, 9))
                assert torch.equal(joined.read(region), whole[region])


@pytest.mark.parametrize("columns", [slice(0, 6), slice(1, 4)])
def test_interleaving_places_each_row_beside_the_one_half_a_head_away(columns):
    halves = torch.randn(16, 6)  # two heads of eight rows
    expected = torch.stack([halves[head * 8 + half * 4 + i] for head in (0, 1) for i in range(4) for half in (0, 1)])
    source = Interleaved(Mapped(halves), head_dim=8)
    assert source.shape == (16, 6)
    for start in range(16):
        for stop in range(start + 1, 17):
            region = (slice(start, stop), columns)
            assert torch.equal(source.read(region), expected[region])
