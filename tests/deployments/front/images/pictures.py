"""Encoded images of every kind, made on the spot."""

import io

import numpy as np
from PIL import Image


def pixels(width: int, height: int, channels: int, seed: int = 0) -> np.ndarray:
    """uint8 [height, width, channels]: a gradient with noise, so that every place differs."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    base = (x * 255 // max(width - 1, 1) + y * 127 // max(height - 1, 1))[..., None] + np.arange(channels) * 40
    return ((base + rng.integers(0, 64, (height, width, channels))) % 256).astype(np.uint8)


def picture(mode: str, width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture in one of Pillow's modes."""
    rgba = Image.fromarray(pixels(width, height, 4, seed), "RGBA")
    if mode == "I;16":
        grey = pixels(width, height, 1, seed)[..., 0].astype(np.uint16)
        return Image.fromarray(grey * 5)  # from 0 to 1275: some within what eight bits hold
    if mode == "CMYK":
        return Image.fromarray(pixels(width, height, 4, seed), "CMYK")
    return rgba if mode == "RGBA" else rgba.convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
