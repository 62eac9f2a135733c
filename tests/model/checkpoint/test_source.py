import itertools

import pytest
import torch

from model.checkpoint.source import Interleaved, Joined, Mapped, Part, Stacked, Transposed


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


def _every_read_of(source, whole):
    """Reads each box of `source` and compares it with the same box of `whole`, which has three dimensions."""
    assert source.shape == tuple(whole.shape)
    spans = [[slice(a, b) for a in range(size) for b in range(a + 1, size + 1)] for size in whole.shape]
    for region in itertools.product(*spans):
        assert torch.equal(source.read(region), whole[region])


def test_a_part_reads_as_the_slice():
    whole = torch.randn(3, 4, 6)
    _every_read_of(Part(Mapped(whole), 2, 2, 5), whole[:, :, 2:5])
    _every_read_of(Part(Mapped(whole), 0, 1, 3), whole[1:])


def test_transposition_and_stacking_read_as_torchs():
    whole = torch.randn(3, 4, 5)
    _every_read_of(Transposed(Mapped(whole)), whole.mT)
    _every_read_of(Stacked(tuple(Mapped(matrix) for matrix in whole)), whole)
    _every_read_of(Stacked(tuple(Transposed(Mapped(matrix)) for matrix in whole)), whole.mT)
