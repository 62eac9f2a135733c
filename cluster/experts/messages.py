"""What clients and servers say to each other. Rows travel as the frame's payload.

Headers are little-endian: kind (4 bytes), a number of it (4), id of the call (8), then what each kind says.
fast_path.cpp writes and reads the first two of them, too.
"""

import struct
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from cluster.streams import Disconnected

DTYPES: tuple[Literal["bfloat16", "float32"], ...] = ("bfloat16", "float32")
REASONS: tuple[Literal["not_held", "invalid", "failed"], ...] = ("not_held", "invalid", "failed")
LONGEST_SECONDS = 1e6
"""What claims to have taken longer is no answer."""
_START = struct.Struct("<IIq")
_CALL, _REPLY, _REFUSAL = 1, 2, 3
_CALL_REST, _PIECE, _REPLY_REST = struct.Struct("<II"), struct.Struct("<II"), struct.Struct("<d")


@dataclass(slots=True)
class Call:
    """Payload: the rows of `experts`, one expert after the other, `counts` of each; [rows, dim] in `dtype`.

    After the start, whose number is of the dtype: layer, number of experts (4 bytes each); expert, count (4 each) of
    every one.
    """

    id: int
    layer: int
    dtype: Literal["bfloat16", "float32"]
    experts: list[int]
    counts: list[int]

    def encode(self) -> bytes:
        start = _START.pack(_CALL, DTYPES.index(self.dtype), self.id)
        pieces = chain.from_iterable(zip(self.experts, self.counts, strict=True))
        rest = struct.pack(f"<{2 * len(self.experts)}I", *pieces)
        return start + _CALL_REST.pack(self.layer, len(self.experts)) + rest


@dataclass(slots=True)
class Reply:
    """Payload: the outputs of call `id`, in the order of its rows. seconds: what computing them took.

    After the start: seconds (8 bytes).
    """

    id: int
    seconds: float

    def encode(self) -> bytes:
        return _START.pack(_REPLY, 0, self.id) + _REPLY_REST.pack(self.seconds)


@dataclass(slots=True)
class Refusal:
    """Call `id` is not answered. "not_held": another server has that expert now; "invalid": nobody could.

    After the start, whose number is of the reason: the message in UTF-8.
    """

    id: int
    reason: Literal["not_held", "invalid", "failed"]
    message: str

    def encode(self) -> bytes:
        return _START.pack(_REFUSAL, REASONS.index(self.reason), self.id) + self.message.encode()


def decode_call(header: bytes | memoryview) -> Call:
    """Raises Disconnected: nothing that follows would make sense either."""
    try:
        kind, dtype, id = _START.unpack_from(header)
        layer, count = _CALL_REST.unpack_from(header, _START.size)
        experts_counts = struct.unpack_from(f"<{2 * count}I", header, _START.size + _CALL_REST.size)
        if kind != _CALL or len(header) != _START.size + _CALL_REST.size + _PIECE.size * count:
            raise ValueError(f"kind {kind}, {count} experts in {len(header)} bytes")
        return Call(id, layer, DTYPES[dtype], list(experts_counts[::2]), list(experts_counts[1::2]))
    except (ValueError, IndexError, struct.error) as error:
        raise Disconnected(f"it sent what is no call: {error}") from error


def decode_answer(header: bytes | memoryview) -> Reply | Refusal:
    """Raises Disconnected, as `decode_call`."""
    try:
        kind, number, id = _START.unpack_from(header)
        if kind == _REFUSAL:
            return Refusal(id, REASONS[number], str(header[_START.size :], "utf-8"))
        if kind != _REPLY:
            raise ValueError(f"kind {kind}")
        (seconds,) = _REPLY_REST.unpack(header[_START.size :])
        if not 0 <= seconds < LONGEST_SECONDS:
            raise ValueError(f"it took {seconds} s")
        return Reply(id, seconds)
    except (ValueError, IndexError, struct.error) as error:
        raise Disconnected(f"it sent what is no answer: {error}") from error
