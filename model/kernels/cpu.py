"""Compiles cpu.cpp (build.py) and calls it on torch tensors.

Where the CPU has no AVX512-BF16, or there is no compiler, `available()` is False and the
model runs on torch alone.
"""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from model.datatypes import PagedBatch
from model.kernels import build

LANES = 16
"""Columns in a packed panel, and keys in a tile of the cache."""
MAX_HEAD_DIM = 256

_SOURCE = Path(__file__).with_name("cpu.cpp")
_FLAGS = ["-pthread", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16"]
_BF16, _FLOAT, _SWIGLU = 0, 1, 2


@functools.cache
def available() -> bool:
    """Whether this machine can run the kernels; compiles them on the first call."""
    if not torch.cpu._is_avx512_bf16_supported():
        return False
    return build.can_build(_library, "CPU kernels are off, plain torch runs instead (slower)")


@functools.cache
def _library() -> ctypes.CDLL:
    library = build.library(_SOURCE, _FLAGS)
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library.moray_pack.argtypes = [pointer, pointer, size, size]
    library.moray_matmul.argtypes = [pointer, size, pointer, pointer, size, size, size, size, ctypes.c_int]
    library.moray_swiglus.argtypes = [pointer] * 4 + [size] + [pointer] * 2 + [size] * 2
    library.moray_rms_norm.argtypes = [pointer, pointer, pointer, size, size, ctypes.c_float]
    library.moray_attention.argtypes = (
        [pointer] * 7 + [size] + [pointer] * 2 + [size, pointer] + [size] * 5 + [ctypes.c_float] * 2
    )
    library.moray_set_num_threads.argtypes = library.moray_park.argtypes = [ctypes.c_int]
    library.moray_set_num_threads(torch.get_num_threads())
    return library


def set_num_threads(threads: int) -> None:
    """Torch's in this thread, and the kernels' in this process."""
    torch.set_num_threads(threads)
    if available():
        _library().moray_set_num_threads(threads)


def park(parked: bool) -> None:
    """While parked, kernels run on the calling thread alone: the CPUs are for others."""
    if available():
        _library().moray_park(parked)


class PackedLinear:
    """`x @ weight.T` with a frozen bfloat16 weight in the kernels' layout.

    weight: [out_features, in_features], in_features even.
    """

    def __init__(self, weight: Tensor) -> None:
        self.out_features, self.in_features = weight.shape
        self._panels = -(-self.out_features // LANES)
        self._weight = _pack(weight)
        self.address = self._weight.data_ptr()

    def __call__(self, x: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """x: bfloat16 [rows, in_features], rows contiguous -> [rows, out_features] in `dtype` (or float32)."""
        rows, width = x.shape[0], self._panels * LANES
        out = torch.empty(rows, width, dtype=dtype)
        epilogue = _FLOAT if dtype is torch.float32 else _BF16
        _library().moray_matmul(
            x.data_ptr(), x.stride(0), self.address, out.data_ptr(), width, rows, self._panels,
            self.in_features, epilogue,
        )  # fmt: skip
        return out if width == self.out_features else out[:, : self.out_features]


class PackedSwiGLU:
    """`silu(x @ gate.T) * (x @ up.T)` in one pass; gate, up: [hidden, in_features], hidden a multiple of 16."""

    def __init__(self, gate: Tensor, up: Tensor) -> None:
        self.hidden, self.in_features = gate.shape
        panels = torch.stack([gate.view(-1, LANES, self.in_features), up.view(-1, LANES, self.in_features)], dim=1)
        self._weight = _pack(panels.reshape(-1, self.in_features))
        self.address = self._weight.data_ptr()

    def __call__(self, x: Tensor) -> Tensor:
        """x: bfloat16 [rows, in_features] -> bfloat16 [rows, hidden]."""
        rows = x.shape[0]
        out = torch.empty(rows, self.hidden, dtype=torch.bfloat16)
        _library().moray_matmul(
            x.data_ptr(), x.stride(0), self.address, out.data_ptr(), self.hidden, rows,
            2 * self.hidden // LANES, self.in_features, _SWIGLU,
        )  # fmt: skip
        return out


def swiglus(
    x: Tensor, gates: Sequence[PackedSwiGLU], downs: Sequence[PackedLinear], counts: Sequence[int]
) -> Tensor:  # fmt: skip
    """Several feed-forwards of one shape in one call: `counts[i]` rows of x through `gates[i]`, then `downs[i]`.

    x: bfloat16 [sum(counts), dim] contiguous, dim a multiple of 16 -> like x, bit by bit as one by one.
    """
    out = torch.empty_like(x)
    if not counts:
        return out
    hidden = torch.empty(x.shape[0], gates[0].hidden, dtype=torch.bfloat16)
    pointers = ctypes.c_void_p * len(counts)
    w13 = pointers(*(gate.address for gate in gates))
    w2 = pointers(*(down.address for down in downs))
    _library().moray_swiglus(
        x.data_ptr(), w13, w2, (ctypes.c_int64 * len(counts))(*counts), len(counts), hidden.data_ptr(),
        out.data_ptr(), x.shape[1], gates[0].hidden,
    )  # fmt: skip
    return out


def swiglus_address() -> int:
    """Of the C function behind `swiglus`, for callers in C."""
    return ctypes.cast(_library().moray_swiglus, ctypes.c_void_p).value or 0


def _pack(weight: Tensor) -> Tensor:
    rows, columns = weight.shape
    if weight.dtype is not torch.bfloat16 or columns % 2:
        raise ValueError(f"cannot pack a weight of {weight.dtype} {tuple(weight.shape)}: bfloat16, even width needed")
    weight = weight.contiguous()
    packed = torch.empty(-(-rows // LANES) * LANES * columns, dtype=torch.bfloat16)
    _library().moray_pack(weight.data_ptr(), packed.data_ptr(), rows, columns)
    return packed


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: bfloat16 [rows, dim] contiguous, dim a multiple of 16; weight: bfloat16 [dim] -> like x."""
    out = torch.empty_like(x)
    _library().moray_rms_norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.shape[0], x.shape[1], eps)
    return out


def paged_attention(
    qkv: Tensor, cosine: Tensor | None, sine: Tensor | None, temperature: Tensor | None, keys: Tensor, values: Tensor,
    block_table: Tensor, batch: PagedBatch, heads: int, kv_heads: int, head_dim: int, block_size: int, chunk: int,
    qk_norm_eps: float,
) -> Tensor:  # fmt: skip
    """Rotates q and k, writes k and v into the cache, attends.

    qkv: bfloat16 [tokens, (heads + 2 * kv_heads) * head_dim] contiguous, changed in place.
    cosine, sine: float32 [tokens, head_dim / 2], or None for a layer without rotary embedding.
    temperature: float32 [tokens], factors of the queries, or None.
    keys, values: one layer of a `PackedCache`. block_table: int32 [sequences, max_blocks] of its KV group.
    chunk: 0, or the length of local attention chunks.
    qk_norm_eps: 0, or the epsilon of the norm of queries and keys.
    Returns bfloat16 [tokens, heads * head_dim].
    """
    out = torch.empty(qkv.shape[0], heads * head_dim, dtype=torch.bfloat16)
    optional = [None if x is None else x.data_ptr() for x in (cosine, sine, temperature)]
    _library().moray_attention(
        qkv.data_ptr(), *optional, keys.data_ptr(), values.data_ptr(), block_table.data_ptr(),
        block_table.stride(0), batch.query_starts.data_ptr(), batch.context_lens.data_ptr(),
        batch.context_lens.shape[0], out.data_ptr(), heads, kv_heads, head_dim, block_size, chunk, qk_norm_eps,
        head_dim**-0.5,
    )  # fmt: skip
    return out
