"""An RGB image cut into the tiles that the model's encoder sees."""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from deployments.front.images.canvas import best_canvas, drawn_size
from deployments.front.images.settings import ImageSettings


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """tiles: uint8 [num_tiles, 3, tile_size, tile_size], row by row; where there are several, the whole
      image in one tile is last. `model.vision.pixels.normalize_pixels` makes them the encoder's input.
    rows, columns: of the tiles, the last one not counted.
    digest: SHA-256 of the tiles in hexadecimal, the same for the same input to the model.
    """

    tiles: NDArray[np.uint8]
    rows: int
    columns: int
    digest: str


def cut(image: Image.Image, settings: ImageSettings) -> PreparedImage:
    """Draws an RGB image on the best canvas, at the top left over black, and cuts that into tiles."""
    size = settings.tile_size
    columns, rows = best_canvas(image.size, size, settings.max_tiles)
    canvas = Image.new("RGB", (columns * size, rows * size))
    canvas.paste(_resized(image, drawn_size(image.size, (columns, rows), size)))
    tiles = np.asarray(canvas).reshape(rows, size, columns, size, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, size, size)
    if len(tiles) > 1:
        whole = np.asarray(_resized(image, (size, size))).transpose(2, 0, 1)
        tiles = np.concatenate([tiles, whole[None]])
    tiles = np.ascontiguousarray(tiles)
    return PreparedImage(tiles, rows, columns, hashlib.sha256(repr((rows, columns)).encode() + tiles.data).hexdigest())


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image.resize(size, Image.Resampling.BILINEAR)
