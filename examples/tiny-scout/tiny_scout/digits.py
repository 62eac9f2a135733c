"""Handwritten digits as pictures. Owns the split: nothing of `HELD_OUT` is ever trained on.

The digits are scikit-learn's `load_digits`: 1,797 of 8 by 8 pixels with ink from 0 to 16, from the
UCI "Optical Recognition of Handwritten Digits" set.
"""

import io
import math
import random

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

INK, LABELS = load_digits(return_X_y=True)
TRAIN, HELD_OUT = train_test_split(np.arange(len(LABELS)), test_size=360, stratify=LABELS, random_state=0)
"""Indices of digits."""

SIDE = 160
"""Of the picture of a held-out digit, in pixels."""
_DRAWN = 64
_SMOOTH = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.NEAREST)


def picture(index: int, side: int = SIDE) -> Image.Image:
    """A digit, dark on white, as someone might send it: RGB, side by side pixels."""
    return _grey(index).resize((side, side), Image.Resampling.BICUBIC).convert("RGB")


def png(index: int, side: int = SIDE) -> bytes:
    """`picture` as a PNG file."""
    file = io.BytesIO()
    picture(index, side).save(file, "PNG")
    return file.getvalue()


def varied_picture(index: int, rng: random.Random) -> Image.Image:
    """A digit turned, moved, stretched and framed a little, at times light on dark."""
    drawn = _grey(index).resize((_DRAWN, _DRAWN), rng.choice(_SMOOTH))
    drawn = drawn.transform(drawn.size, Image.Transform.AFFINE, _affine(rng), Image.Resampling.BILINEAR, fillcolor=255)
    left, top, right, bottom = (rng.choice((0, 0, rng.randrange(16))) for _ in range(4))
    framed = Image.new("L", (_DRAWN + left + right, _DRAWN + top + bottom), 255)
    framed.paste(drawn, (left, top))
    dark, light = rng.randrange(60), rng.randrange(195, 256)
    if rng.random() < 0.2:
        dark, light = light, dark
    return framed.point([dark + (light - dark) * level // 255 for level in range(256)]).convert("RGB")


def _grey(index: int) -> Image.Image:
    return Image.fromarray((255 - INK[index].reshape(8, 8) * 255 / 16).astype(np.uint8))


def _affine(rng: random.Random) -> tuple[float, ...]:
    """From places in the result to places in the original: x = a X + b Y + c, y = d X + e Y + f."""
    angle, shear = math.radians(rng.gauss(0, 6)), rng.gauss(0, 0.08)
    wide, high = rng.uniform(0.88, 1.15), rng.uniform(0.88, 1.15)
    a, b = math.cos(angle) / wide, (math.sin(angle) + shear) / wide
    d, e = -math.sin(angle) / high, math.cos(angle) / high
    middle = _DRAWN / 2
    right, down = rng.gauss(0, 2.5), rng.gauss(0, 2.5)
    return a, b, middle - a * middle - b * middle + right, d, e, middle - d * middle - e * middle + down
