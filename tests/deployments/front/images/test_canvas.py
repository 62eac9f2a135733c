"""Canvases against Meta's choice, for sizes on and beside every border."""

import random
from types import ModuleType

import pytest
import torch

from deployments.front.images.canvas import best_canvas, canvases, drawn_size


def sizes(tile: int, seed: int) -> list[tuple[int, int]]:
    rng = random.Random(seed)
    special = [1, 2, tile // 2, tile - 1, tile, tile + 1, 2 * tile, 3 * tile - 1, 3 * tile, 4 * tile, 5 * tile, 10_000]
    drawn = [(rng.randint(1, 6 * tile), rng.randint(1, 6 * tile)) for _ in range(300)]
    return [(width, height) for width in special for height in special] + drawn


@pytest.mark.parametrize(("tile", "max_tiles"), [(448, 16), (336, 16), (16, 4), (8, 1), (336, 5), (100, 12)])
def test_canvas_and_size_equal_metas(tile, max_tiles, chat_format: ModuleType):
    theirs = chat_format.VariableSizeImageTransform(tile)
    possible = torch.tensor(theirs.find_supported_resolutions(max_tiles, tile))
    assert [(w * tile, h * tile) for w, h in canvases(max_tiles)] == [tuple(size) for size in possible.tolist()]
    for image in sizes(tile, seed=tile):
        expected = theirs.get_best_fit(image, possible)
        columns, rows = best_canvas(image, tile, max_tiles)
        assert (columns * tile, rows * tile) == expected, image
        target = tuple(min(max(side, tile), most) for side, most in zip(image, expected, strict=True))
        width, height = theirs.get_max_res_without_distortion(image, target)
        assert drawn_size(image, (columns, rows), tile) == (max(width, 1), max(height, 1)), image


@pytest.mark.parametrize(
    ("image", "canvas", "drawn"),
    [
        ((1, 1), (1, 1), (336, 336)),
        ((1, 10_000), (1, 16), (1, 5376)),
        ((336, 336), (1, 1), (336, 336)),
        ((400, 336), (2, 1), (400, 336)),
        ((5000, 5000), (4, 4), (1344, 1344)),
    ],
)
def test_sizes_worked_out_by_hand(image, canvas, drawn):
    assert best_canvas(image, 336, 16) == canvas
    assert drawn_size(image, canvas, 336) == drawn
