"""The parts of a dense transformer block. Each reads and writes `x` of shape [..., dim], whatever the leading shape.

Attention leaves keys and values, and who sees whom, to the `KeyValues` it is given (kv_cache.py).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from model import load_hooks
from model.args import ModelArgs
from model.kv_cache import KeyValues
from model.parallel import split


def column_parallel(dim_in: int, dim_out: int, *, bias: bool = False, gather: bool = False) -> ColumnParallelLinear:
    """Each rank computes its own columns of the output. Weights start uninitialized: `LLM` fills them.

    gather: every rank gets the columns of all.
    """
    return ColumnParallelLinear(dim_in, dim_out, bias=bias, gather_output=gather, init_method=lambda w: w)


def row_parallel(dim_in: int, dim_out: int, *, bias: bool = False) -> RowParallelLinear:
    """Each rank reads its own columns of the input; outputs are summed over ranks."""
    return RowParallelLinear(dim_in, dim_out, bias=bias, input_is_parallel=True, init_method=lambda w: w)


def normalize(x: Tensor, eps: float) -> Tensor:
    """x over its root mean square (Zhang and Sennrich, 2019) in the last dimension, computed in float32."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).type_as(x)


class RMSNorm(nn.Module):
    """`normalize` and a learned scale."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return normalize(x, self.eps) * self.weight


def apply_scaling(freqs: Tensor, args: ModelArgs) -> Tensor:
    """Stretches the slow rotations for a longer context, as Llama 3.1 does.

    Frequencies of wavelength above `original_len / low_freq_factor` are divided by the scaling
    factor, those below `original_len / high_freq_factor` stay, those between are interpolated.
    freqs: float32 [head_dim / 2] -> the same shape.
    """
    low, high = args.rope_low_freq_factor, args.rope_high_freq_factor
    wavelengths = 2 * math.pi / freqs
    turns = args.rope_original_max_len / wavelengths
    smooth = ((turns - low) / (high - low)).clamp(0, 1) if high > low else (turns > high).to(freqs.dtype)
    return freqs * (smooth + (1 - smooth) / args.rope_scaling_factor)


class RotaryEmbedding(nn.Module):
    """Rotary position embedding (Su et al., 2021) over interleaved pairs: cosines and sines by position."""

    cosine: Tensor
    sine: Tensor

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self._fill_tables(torch.device("cpu"))

    def _fill_tables(self, device: torch.device) -> None:
        args = self.args
        half = torch.arange(0, args.width_of_head, 2, dtype=torch.float32, device=device) / args.width_of_head
        freqs = 1.0 / args.rope_theta**half
        if args.use_scaled_rope:
            freqs = apply_scaling(freqs, args)
        angles = torch.outer(torch.arange(args.max_seq_len, dtype=torch.float32, device=device), freqs)
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotaryEmbedding":
        """Follows the model to a device, but stays float32 when it is cast: bfloat16 cannot tell positions apart."""
        super()._apply(fn, recurse)
        self._fill_tables(self.get_buffer("cosine").device)
        return self

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions: int64 [...] -> cosines and sines, float32 [..., head_dim / 2] each."""
        return self.cosine[positions], self.sine[positions]


class Positional(NamedTuple):
    """What a token's position means to attention. Leading shape [...] is the tokens'."""

    cosine: Tensor  # float32 [..., head_dim / 2]
    sine: Tensor  # float32 [..., head_dim / 2]
    temperature: Tensor | None  # float32 [...], scale of queries in NoPE layers


def attention_temperature(positions: Tensor, args: ModelArgs) -> Tensor | None:
    """log(floor((position + 1) / floor_scale) + 1) * attn_scale + 1, or None where tuning is off."""
    if not args.attn_temperature_tuning:
        return None
    return torch.log(torch.floor((positions + 1.0) / args.floor_scale) + 1.0) * args.attn_scale + 1.0


def rotate(x: Tensor, where: Positional) -> Tensor:
    """Turns the pairs of x [..., heads, head_dim] by the angles of their positions."""
    cosine, sine = where.cosine.unsqueeze(-2), where.sine.unsqueeze(-2)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1)
    return turned.flatten(-2).type_as(x)


class Attention(nn.Module):
    """Multi-head or grouped-query attention; heads are split over tensor-parallel ranks.

    In an iRoPE model most layers rotate queries and keys and see their own chunk; NoPE layers
    do neither.
    """

    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.is_nope = args.is_nope_layer(layer)
        self.chunk = None if self.is_nope else args.attention_chunk_size
        self.qk_norm_eps = args.norm_eps if args.use_qk_norm and not self.is_nope else None
        self.head_dim = args.width_of_head
        self.heads = split(args.n_heads, "n_heads")
        self.kv_heads = split(args.kv_heads, "n_kv_heads")
        self.wq = column_parallel(args.dim, args.n_heads * self.head_dim)
        self.wk = column_parallel(args.dim, args.kv_heads * self.head_dim)
        self.wv = column_parallel(args.dim, args.kv_heads * self.head_dim)
        self.wo = row_parallel(args.n_heads * self.head_dim, args.dim)
        rows = {"wq.weight": self.heads, "wk.weight": self.kv_heads, "wv.weight": self.kv_heads}
        self.register_load_state_dict_pre_hook(load_hooks.SplitRows(load_hooks.FUSED_QKV, rows))

    def forward(self, x: Tensor, where: Positional, kv: KeyValues) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        if not self.is_nope:
            q, k = rotate(q, where), rotate(k, where)
        elif where.temperature is not None:
            q = (q * where.temperature[..., None, None]).type_as(q)
        if self.qk_norm_eps is not None:
            q, k = normalize(q, self.qk_norm_eps), normalize(k, self.qk_norm_eps)
        return self.wo(kv.attend(self.layer, q, k, v, self.chunk).flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020); the hidden width is split over tensor-parallel ranks."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        split(hidden_dim, "hidden_dim")
        self.w1 = column_parallel(dim, hidden_dim)
        self.w3 = column_parallel(dim, hidden_dim)
        self.w2 = row_parallel(hidden_dim, dim)
        rows = {"w1.weight": 1, "w3.weight": 1}
        self.register_load_state_dict_pre_hook(load_hooks.SplitRows(load_hooks.FUSED_W1_W3, rows))
        self.register_load_state_dict_pre_hook(load_hooks.Rename(load_hooks.FEED_FORWARD_NAMES))

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))
