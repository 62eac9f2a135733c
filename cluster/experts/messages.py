"""What clients and servers say to each other. Headers are msgpack; rows travel as the frame's payload."""

from typing import Literal, TypeVar

import msgspec

from cluster.streams import Disconnected

T = TypeVar("T")


class Call(msgspec.Struct, array_like=True, tag="call"):
    """Payload: the rows of `experts`, one expert after the other, `counts` of each; [rows, dim] in `dtype`."""

    id: int
    layer: int
    dtype: Literal["bfloat16", "float32"]
    experts: list[int]
    counts: list[int]


class Reply(msgspec.Struct, array_like=True, tag="reply"):
    """Payload: the outputs of call `id`, in the order of its rows. seconds: what computing them took."""

    id: int
    seconds: float


class Refusal(msgspec.Struct, array_like=True, tag="refusal"):
    """Call `id` is not answered. "not_held": another server has that expert now; "invalid": nobody could."""

    id: int
    reason: Literal["not_held", "invalid", "failed"]
    message: str


encode = msgspec.msgpack.Encoder().encode
_calls: msgspec.msgpack.Decoder[Call] = msgspec.msgpack.Decoder(Call)
_answers: msgspec.msgpack.Decoder[Reply | Refusal] = msgspec.msgpack.Decoder(Reply | Refusal)


def decode_call(header: bytes | memoryview) -> Call:
    """Raises Disconnected: nothing that follows would make sense either."""
    return _decode(_calls, header, "call")


def decode_answer(header: bytes | memoryview) -> Reply | Refusal:
    """Raises Disconnected, as `decode_call`."""
    return _decode(_answers, header, "answer")


def _decode(decoder: msgspec.msgpack.Decoder[T], header: bytes | memoryview, what: str) -> T:
    try:
        return decoder.decode(header)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Disconnected(f"it sent what is no {what}: {error}") from error
