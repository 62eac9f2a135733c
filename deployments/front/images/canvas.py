"""Which canvas of tiles an image is drawn on, and how large. Pure functions of sizes, all (width, height) in pixels.

Choices are those of Meta's `VariableSizeImageTransform`, including their float32: the image is
shrunk as little as possible, enlarged no further than to one tile, never distorted.
"""

import math
from functools import cache

import numpy as np

Size = tuple[int, int]


@cache
def canvases(max_tiles: int) -> tuple[Size, ...]:
    """Every (columns, rows) of at most `max_tiles` tiles.

    Larger ones first, those of one aspect ratio together: of equally good canvases the first wins.
    """
    by_ratio: dict[float, list[Size]] = {}
    for tiles in range(max_tiles, 0, -1):
        for columns in range(1, tiles + 1):
            if tiles % columns == 0:
                rows = tiles // columns
                by_ratio.setdefault(columns / rows, []).append((columns, rows))
    return tuple(canvas for same_ratio in by_ratio.values() for canvas in same_ratio)


def best_canvas(image: Size, tile_size: int, max_tiles: int) -> Size:
    """(columns, rows) of the canvas that shrinks the image least, or enlarges it least; the smallest of those."""
    choices = canvases(max_tiles)
    sides = np.array(choices, dtype=np.float32) * tile_size
    scales = (sides / np.array(image, dtype=np.float32)).min(axis=1)
    scale = scales[scales >= 1].min() if (scales >= 1).any() else scales.max()
    fitting = [choice for choice, its_scale in zip(choices, scales, strict=True) if its_scale == scale]
    return min(fitting, key=lambda canvas: canvas[0] * canvas[1])


def drawn_size(image: Size, canvas: Size, tile_size: int) -> Size:
    """The size at which the image is drawn on a canvas of so many columns and rows."""
    width, height = image
    most_width = min(max(width, tile_size), canvas[0] * tile_size)
    most_height = min(max(height, tile_size), canvas[1] * tile_size)
    scale_width, scale_height = most_width / width, most_height / height
    if scale_width < scale_height:
        drawn = most_width, min(math.floor(height * scale_width), most_height)
    else:
        drawn = min(math.floor(width * scale_height), most_width), most_height
    return max(drawn[0], 1), max(drawn[1], 1)
