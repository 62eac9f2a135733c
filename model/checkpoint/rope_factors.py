"""Rotary settings of a GGUF file.

For Llama 3.1 and later llama.cpp's converter writes no settings but their result: a tensor of what
each frequency is divided by. The settings are recovered from it, and must give the same tensor again.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.checkpoint.config import refuse
from model.checkpoint.errors import CheckpointError
from model.checkpoint.gguf_file import StoredTensor
from model.checkpoint.quantized import stored_source

_DEFAULT_THETA = 10000.0
_LOW_HIGH = ((1.0, 4.0), (1.0, 1.0))
"""Low and high frequency factors of the published models: Llama 3.1 to 3.3, Llama 4."""
_ORIGINAL_MAX_LEN = 8192


def rope_fields(settings: dict[str, Any], factors: StoredTensor | None, head_dim: int, path: Path) -> dict[str, Any]:
    """The rotary fields of ModelArgs. CheckpointError for a scaling that ModelArgs cannot express."""
    theta = settings.get("llama.rope.freq_base", _DEFAULT_THETA)
    if settings.get("llama.rope.scaling.factor") not in (None, 0.0, 1.0):
        refuse(settings, {"llama.rope.scaling.type": ("none",)}, path)
        refuse(settings, {"llama.rope.scaling.factor": (0.0, 1.0)}, path)
    refuse(settings, {"llama.rope.scaling.type": ("none", "linear")}, path)
    if factors is None:
        return {"rope_theta": theta}
    if factors.shape != (head_dim // 2,):
        raise CheckpointError(f"{path}: rope_freqs.weight has shape {list(factors.shape)}, not [{head_dim // 2}]")
    divisors = stored_source(factors).read((slice(0, head_dim // 2),)).float()
    if torch.all(divisors == 1):
        return {"rope_theta": theta}
    original = settings.get("llama.rope.scaling.original_context_length", _ORIGINAL_MAX_LEN)
    freqs = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    scale = float(divisors.max())
    for low, high in _LOW_HIGH:
        if torch.allclose(_divisors(freqs, scale, low, high, original), divisors.double(), rtol=1e-4):
            return {
                "rope_theta": theta,
                "use_scaled_rope": True,
                "rope_scaling_factor": scale,
                "rope_low_freq_factor": low,
                "rope_high_freq_factor": high,
                "rope_original_max_len": original,
            }
    raise CheckpointError(f"{path}: the scaling of rotary frequencies in rope_freqs.weight is not that of Llama 3 or 4")


def _divisors(freqs: Tensor, scale: float, low: float, high: float, original: int) -> Tensor:
    """What Llama 3.1's scaling divides each frequency by."""
    turns = original * freqs / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1) if high > low else (turns > high).double()
    return 1 / (smooth + (1 - smooth) / scale)
