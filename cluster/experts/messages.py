"""What clients and servers say to each other. Headers are msgpack; rows travel as the frame's payload."""

from typing import Literal

import msgspec


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
decode_call = msgspec.msgpack.Decoder(Call).decode
decode_answer = msgspec.msgpack.Decoder(Reply | Refusal).decode
