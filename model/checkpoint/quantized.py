"""Tensors of a GGUF file as sources: dequantized to float32, only the blocks that a read touches.

The plain 4- and 8-bit blocks are unpacked in torch, several times faster than by the `gguf` library,
which stays the reference for them and does all other types.
"""

from dataclasses import dataclass

import gguf
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from model.checkpoint.gguf_file import StoredTensor
from model.checkpoint.source import Mapped, Region, TensorSource

_FLOATS = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
_BLOCKS = {
    GGMLQuantizationType.Q8_0,
    GGMLQuantizationType.Q4_0,
    GGMLQuantizationType.Q4_1,
    GGMLQuantizationType.Q5_0,
    GGMLQuantizationType.Q5_1,
    GGMLQuantizationType.Q2_K,
    GGMLQuantizationType.Q3_K,
    GGMLQuantizationType.Q4_K,
    GGMLQuantizationType.Q5_K,
    GGMLQuantizationType.Q6_K,
}
SUPPORTED_TYPES = frozenset(_FLOATS) | _BLOCKS


def stored_source(stored: StoredTensor) -> TensorSource:
    """A source of the tensor, whose type must be one of SUPPORTED_TYPES."""
    if stored.type in _FLOATS:
        return Mapped(torch.from_numpy(stored.data).view(_FLOATS[stored.type]))
    return Quantized(stored)


@dataclass(frozen=True, eq=False)
class Quantized:
    """A tensor whose rows are blocks of quantized values."""

    stored: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    def read(self, region: Region) -> Tensor:
        *rows, columns = region
        size, size_bytes = GGML_QUANT_SIZES[self.stored.type]
        first, last = columns.start // size, -(-columns.stop // size)
        packed = self.stored.data[(*rows, slice(first * size_bytes, last * size_bytes))]
        if unpack := _UNPACK.get(self.stored.type):
            values = unpack(torch.from_numpy(packed).reshape(-1, size_bytes))
        else:
            # As one long row: the library works on 16 rows at a time, which is slow when rows are short.
            values = torch.from_numpy(gguf.dequantize(packed.reshape(1, -1), self.stored.type))
        values = values.view(*packed.shape[:-1], (last - first) * size)
        return values[..., columns.start - first * size : columns.stop - first * size]


def _unpack_q8_0(blocks: Tensor) -> Tensor:
    """uint8 [n, 34]: float16 scale, 32 x int8 -> float32 [n, 32]."""
    return blocks[:, 2:].view(torch.int8) * _half(blocks, 0)


def _unpack_q4_0(blocks: Tensor) -> Tensor:
    """uint8 [n, 18]: float16 scale, 32 x 4 bits less 8, first half in the low bits -> float32 [n, 32]."""
    scale = _half(blocks, 0)
    values = torch.empty(len(blocks), 32)
    torch.mul((blocks[:, 2:] & 15).view(torch.int8) - 8, scale, out=values[:, :16])
    torch.mul((blocks[:, 2:] >> 4).view(torch.int8) - 8, scale, out=values[:, 16:])
    return values


def _unpack_q4_1(blocks: Tensor) -> Tensor:
    """uint8 [n, 20]: float16 scale, float16 minimum, 32 x 4 bits, as above -> float32 [n, 32]."""
    scale = _half(blocks, 0)
    values = torch.empty(len(blocks), 32)
    torch.mul(blocks[:, 4:] & 15, scale, out=values[:, :16])
    torch.mul(blocks[:, 4:] >> 4, scale, out=values[:, 16:])
    return values.add_(_half(blocks, 2))


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at byte `at` of each block, as float32 [n, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


_UNPACK = {
    GGMLQuantizationType.Q8_0: _unpack_q8_0,
    GGMLQuantizationType.Q4_0: _unpack_q4_0,
    GGMLQuantizationType.Q4_1: _unpack_q4_1,
}
