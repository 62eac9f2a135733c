"""The rows of one layer and step that are with expert servers, and those that are back."""

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.experts.routes import Segment
from cluster.streams import memory

_NAMES: dict[torch.dtype, Literal["bfloat16", "float32"]] = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


class Rows:
    """Sorted by where they go, so that what goes to a server lies together.

    x_kD: bfloat16 or float32 [k, D]. order: int64 [k], which sorts them.
    """

    def __init__(self, x_kD: Tensor, order: NDArray[np.int64]) -> None:
        self.dtype = _NAMES[x_kD.dtype]
        self._order = torch.from_numpy(order)
        rows = x_kD[self._order]
        self._out = torch.empty_like(rows)
        self._sent, self._back = memory(rows), memory(self._out)
        self._row_bytes = rows.shape[1] * rows.itemsize
        self.missing = len(order)
        self._missing: NDArray[np.bool_] | None = None
        """Which they are, once rows may come twice; until then a segment is there when its call is answered."""
        self._filled: list[Segment] = []

    def part(self, segment: Segment) -> memoryview:
        """What is sent of it."""
        return self._sent[segment.start * self._row_bytes : segment.stop * self._row_bytes]

    def num_bytes(self, segment: Segment) -> int:
        """Of its answer."""
        return segment.num_rows * self._row_bytes

    def fill(self, segment: Segment, payload: memoryview) -> None:
        """Takes the answer. Rows that another answer brought before are the same bits."""
        self._back[segment.start * self._row_bytes : segment.stop * self._row_bytes] = payload
        if self._missing is None:
            self.missing -= segment.num_rows
            self._filled.append(segment)
            return
        self._missing[segment.start : segment.stop] = False
        self.missing = int(self._missing.sum())

    def lack(self, segment: Segment) -> bool:
        """Whether any row of `segment` is not back."""
        return self._missing is None or bool(self._missing[segment.start : segment.stop].any())

    def expect_twice(self) -> None:
        """From now on rows may come from two servers: keeps account of which are there."""
        if self._missing is None:
            self._missing = np.ones(len(self._order), np.bool_)
            for segment in self._filled:
                self._missing[segment.start : segment.stop] = False

    def returned(self) -> Tensor:
        """[k, D], in the order they came in."""
        return torch.empty_like(self._out).index_copy_(0, self._order, self._out)
