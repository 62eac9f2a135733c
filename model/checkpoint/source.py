"""Tensors that can be read in parts, and how to compose them. Knows nothing of names, ranks or file formats."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Region = tuple[slice, ...]
"""One slice with start and stop (no step) for every dimension of a tensor."""


class TensorSource(Protocol):
    """A tensor on disk. `shape` costs nothing; `read` touches only what the region needs."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, region: Region) -> Tensor:
        """The values in `region`, of a floating dtype. It may alias the file: copy, do not keep."""
        ...


@dataclass(frozen=True, eq=False)
class Mapped:
    """A tensor whose storage is a memory-mapped file."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def read(self, region: Region) -> Tensor:
        return self.tensor[region]


@dataclass(frozen=True, eq=False)
class Joined:
    """Tensors that are one, cut along `dim`."""

    parts: tuple[TensorSource, ...]
    dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.parts[0].shape)
        shape[self.dim] = sum(part.shape[self.dim] for part in self.parts)
        return tuple(shape)

    def read(self, region: Region) -> Tensor:
        wanted, pieces, begin = region[self.dim], [], 0
        for part in self.parts:
            size = part.shape[self.dim]
            start, stop = max(wanted.start - begin, 0), min(wanted.stop - begin, size)
            if start < stop:
                pieces.append(part.read((*region[: self.dim], slice(start, stop), *region[self.dim + 1 :])))
            begin += size
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.dim)


@dataclass(frozen=True, eq=False)
class Part:
    """`start` to `stop` of a tensor along `dim`."""

    source: TensorSource
    dim: int
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.source.shape[: self.dim], self.stop - self.start, *self.source.shape[self.dim + 1 :])

    def read(self, region: Region) -> Tensor:
        wanted = region[self.dim]
        moved = slice(wanted.start + self.start, wanted.stop + self.start)
        return self.source.read((*region[: self.dim], moved, *region[self.dim + 1 :]))


@dataclass(frozen=True, eq=False)
class Transposed:
    """The last two dimensions exchanged."""

    source: TensorSource

    @property
    def shape(self) -> tuple[int, ...]:
        *rest, rows, columns = self.source.shape
        return (*rest, columns, rows)

    def read(self, region: Region) -> Tensor:
        *rest, rows, columns = region
        return self.source.read((*rest, columns, rows)).transpose(-2, -1)


@dataclass(frozen=True, eq=False)
class Stacked:
    """Tensors of one shape along a new first dimension."""

    parts: tuple[TensorSource, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.parts), *self.parts[0].shape)

    def read(self, region: Region) -> Tensor:
        which, *rest = region
        tensors = [part.read(tuple(rest)) for part in self.parts[which]]
        return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


@dataclass(frozen=True, eq=False)
class Interleaved:
    """The rows of a query or key projection whose rotary pairs are the two halves of each head, made adjacent.

    Row `i` of the first half of a head becomes row `2i` of it, row `i` of the second half row `2i + 1`.
    """

    source: TensorSource
    head_dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    def read(self, region: Region) -> Tensor:
        rows, *rest = region
        begin = rows.start // self.head_dim * self.head_dim
        end = -(-rows.stop // self.head_dim) * self.head_dim
        halves = self.source.read((slice(begin, end), *rest)).unflatten(0, (-1, 2, self.head_dim // 2))
        return halves.transpose(1, 2).flatten(0, 2)[rows.start - begin : rows.stop - begin]
