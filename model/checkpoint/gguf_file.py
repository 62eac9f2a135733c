"""The container of GGUF: key-value settings, and tensors as they lie in the file. Knows no architecture.

`gguf.GGUFReader` makes a numpy view of every string, which takes seconds for a vocabulary of 50,000;
this reads the same in a tenth of one.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

from model.checkpoint.errors import CheckpointError

MAGIC = b"GGUF"
_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """shape: slowest dimension first, as in torch.

    data: uint8 [*shape[:-1], bytes of a row], memory-mapped.
    """

    shape: tuple[int, ...]
    type: GGMLQuantizationType
    data: NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class GGUFFile:
    """metadata: strings as `str`, arrays as lists. tensors: in the order of the file."""

    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


def read_gguf(path: Path) -> GGUFFile:
    """Maps the file at `path`. Raises CheckpointError when it is not GGUF, or cut short."""
    if path.stat().st_size < 24:
        raise CheckpointError(f"{path} is too short to be a GGUF file")
    # Copy-on-write: torch warns about memory that it must not write to.
    data = np.memmap(path, np.uint8, mode="c").view(np.ndarray)
    try:
        return _Cursor(data).file()
    except (struct.error, ValueError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{path} is not a readable GGUF file: {error}") from error


class _Cursor:
    """Walks over the bytes of the file."""

    def __init__(self, data: NDArray[np.uint8]) -> None:
        self._data = data
        self._bytes = memoryview(data)  # type: ignore[arg-type]
        self._at = 0

    def file(self) -> GGUFFile:
        magic, version, num_tensors, num_keys = self._unpack("4sIQQ")
        if magic != MAGIC:
            raise ValueError(f"it starts with {magic!r}")
        if version not in (2, 3):
            raise ValueError(f"version {version} (2 and 3, little-endian, are supported)")
        metadata = {self._string(): self._value(self._unpack("I")[0]) for _ in range(num_keys)}
        infos = [self._tensor_info() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        begin = -(-self._at // alignment) * alignment
        return GGUFFile(
            metadata, {name: self._tensor(name, begin + at, shape, kind) for name, at, shape, kind in infos}
        )

    def _tensor_info(self) -> tuple[str, int, tuple[int, ...], int]:
        name = self._string()
        (num_dims,) = self._unpack("I")
        shape = self._unpack(f"{num_dims}Q")[::-1]
        kind, offset = self._unpack("IQ")
        return name, offset, shape, kind

    def _tensor(self, name: str, begin: int, shape: tuple[int, ...], kind: int) -> StoredTensor:
        tensor_type = GGMLQuantizationType(kind)
        block, block_bytes = GGML_QUANT_SIZES[tensor_type]
        if shape[-1] % block:
            raise ValueError(f"rows of {name} ({shape[-1]}) are not whole blocks of {tensor_type.name} ({block})")
        packed = (*shape[:-1], shape[-1] // block * block_bytes)
        end = begin + math.prod(packed)
        if end > len(self._data):
            raise ValueError(f"cut short: {name} ends at byte {end} of {len(self._data)}; download it again")
        return StoredTensor(shape, tensor_type, self._data[begin:end].reshape(packed))

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        packed = struct.Struct("<" + layout)
        values = packed.unpack_from(self._bytes, self._at)
        self._at += packed.size
        return values

    def _string(self) -> str:
        return self._strings(1)[0]

    def _strings(self, count: int) -> list[str]:
        data, at, strings = self._bytes, self._at, []
        for _ in range(count):
            (length,) = _LENGTH.unpack_from(data, at)
            at += 8 + length
            strings.append(str(data[at - length : at], "utf-8"))
        if at > len(data):
            raise ValueError("it ends inside its metadata")
        self._at = at
        return strings

    def _value(self, kind: int) -> Any:
        if kind == GGUFValueType.STRING:
            return self._string()
        if kind != GGUFValueType.ARRAY:
            return self._unpack(_SCALARS[GGUFValueType(kind)])[0]
        item_kind, count = self._unpack("IQ")
        if item_kind == GGUFValueType.STRING:
            return self._strings(count)
        if item_kind == GGUFValueType.ARRAY:
            return [self._value(item_kind) for _ in range(count)]
        return list(self._unpack(f"{count}{_SCALARS[GGUFValueType(item_kind)]}"))
