"""Reads the key-value part of a GGUF file, and nothing else.

`gguf.GGUFReader` makes a numpy view of every string, which takes seconds for a vocabulary; a server
that should be ready in seconds reads the 100,000 strings of it in a tenth of one.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

import mmap
import struct
from pathlib import Path
from typing import Any

from gguf import GGUFValueType

from deployments.front.tokenizer.base import TokenizerError

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


def read_gguf_metadata(path: Path) -> dict[str, Any]:
    """All keys and values of the file; strings as `str`, arrays as lists.

    Raises TokenizerError when the file is no GGUF file of a known version, or ends early.
    """
    with path.open("rb") as file:
        if path.stat().st_size < 24:
            raise TokenizerError(f"{path}: too short to be a GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _Cursor(data).metadata()
            except (struct.error, ValueError) as error:
                raise TokenizerError(f"{path}: not a readable GGUF file: {error}") from error


class _Cursor:
    """Walks over the bytes of the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def metadata(self) -> dict[str, Any]:
        magic, version, _, num_keys = self._unpack("4sIQQ")
        if magic != b"GGUF":
            raise ValueError(f"it starts with {magic!r}")
        if version not in (2, 3):
            raise ValueError(f"version {version} (2 and 3 are supported)")
        return {self._string(): self._value(self._unpack("I")[0]) for _ in range(num_keys)}

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        packed = struct.Struct("<" + layout)
        values = packed.unpack_from(self._data, self._at)
        self._at += packed.size
        return values

    def _string(self) -> str:
        return self._strings(1)[0]

    def _strings(self, count: int) -> list[str]:
        data, at, strings = self._data, self._at, []
        for _ in range(count):
            (length,) = _LENGTH.unpack_from(data, at)
            at += 8 + length
            strings.append(data[at - length : at].decode())
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
