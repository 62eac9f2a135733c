"""The pixel values that Llama 4's encoder was trained on."""

import torch
from torch import Tensor


def normalize_pixels(tiles: Tensor) -> Tensor:
    """uint8, 0 to 255, any shape -> float32 of the same shape, -1 to 1 (mean and deviation 0.5)."""
    if tiles.dtype is not torch.uint8:
        raise TypeError(f"pixels must be uint8, got {tiles.dtype}")
    return (tiles.float() / 255 - 0.5) / 0.5
