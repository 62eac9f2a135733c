"""What rank 0 tells the others: one frame of plain bytes for each step, image or beat. Nothing is pickled."""

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from cluster.parallel import Transport
from model.datatypes import PagedBatch

ALIGNMENT = 64
MAX_DIMS = 4

_FIELDS = (
    "tokens", "positions", "query_starts", "context_lens", "block_tables", "logit_rows", "image_rows",
    "image_embeddings",
)  # fmt: skip
_DTYPES = (torch.int64, torch.int32, torch.uint8, torch.float32, torch.bfloat16)
_ABSENT = -1
_PER_TENSOR = 2 + MAX_DIMS
_HEADER = 2 + _PER_TENSOR * len(_FIELDS)
"""int64 numbers: kind, num_decodes, and of each tensor its dtype, number of dimensions, and dimensions."""


class Kind(IntEnum):
    STEP = 1
    """Run a batch."""
    IMAGE = 2
    """Encode the tiles of an image."""
    BEAT = 3
    """Nothing to do: rank 0 lives, and sees that the others do."""
    STOP = 4
    PROBE = 5
    """Answer, and have every expert answer."""


@dataclass(frozen=True)
class Frame:
    """batch: of a step. tiles: uint8 [num_tiles, 3, height, width] of an image."""

    kind: Kind
    batch: PagedBatch | None = None
    tiles: Tensor | None = None


def encode(frame: Frame) -> Tensor:
    """uint8 [num_bytes]."""
    batch = frame.batch
    tensors = [None] * len(_FIELDS) if batch is None else [getattr(batch, name) for name in _FIELDS]
    tensors[0] = frame.tiles if frame.tiles is not None else tensors[0]
    header, size = [int(frame.kind), 0 if batch is None else batch.num_decodes], _padded(_HEADER * 8)
    places = []
    for tensor in tensors:
        header += _described(tensor)
        places.append(size)
        size += 0 if tensor is None else _padded(tensor.nbytes)
    data = torch.empty(size, dtype=torch.uint8)
    data[: _HEADER * 8].view(torch.int64).copy_(torch.tensor(header))
    for tensor, place in zip(tensors, places, strict=True):
        if tensor is not None and tensor.nbytes:
            data[place : place + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
    return data


def decode(data: Tensor) -> Frame:
    """The frame that was encoded; its tensors share the memory of `data`."""
    header = data[: _HEADER * 8].view(torch.int64).tolist()
    kind, place = Kind(header[0]), _padded(_HEADER * 8)
    tensors: list[Tensor | None] = []
    for start in range(2, _HEADER, _PER_TENSOR):
        dtype, dims, *shape = header[start : start + _PER_TENSOR]
        if dtype == _ABSENT:
            tensors.append(None)
            continue
        size = _DTYPES[dtype].itemsize * torch.Size(shape[:dims]).numel()
        tensors.append(data[place : place + size].view(_DTYPES[dtype]).view(shape[:dims]))
        place += _padded(size)
    if kind is Kind.IMAGE:
        return Frame(kind, tiles=tensors[0])
    if kind is not Kind.STEP:
        return Frame(kind)
    return Frame(kind, _batch(tensors, header[1]))


def _batch(tensors: list[Tensor | None], num_decodes: int) -> PagedBatch:
    fields: dict[str, Any] = dict(zip(_FIELDS, tensors, strict=True))
    return PagedBatch(**fields, num_decodes=num_decodes)


def send(frame: Frame, transport: Transport) -> None:
    """From rank 0; `receive` is the other end. Waits until every rank is there to take it."""
    data = encode(frame)
    transport.broadcast(torch.tensor([len(data)]), 0)
    transport.broadcast(data, 0)


def receive(transport: Transport) -> Frame:
    """The next frame of rank 0; waits for one."""
    size = int(transport.broadcast(torch.zeros(1, dtype=torch.int64), 0))
    return decode(transport.broadcast(torch.empty(size, dtype=torch.uint8), 0))


def _described(tensor: Tensor | None) -> list[int]:
    if tensor is None:
        return [_ABSENT, 0, *[0] * MAX_DIMS]
    return [_DTYPES.index(tensor.dtype), tensor.dim(), *tensor.shape, *[0] * (MAX_DIMS - tensor.dim())]


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
