"""Shared memory as a backend of torch.distributed, so that fairscale's groups and layers run over it.

`init_process_group("shm", …)` and `new_group(…, backend="shm")` make one; the store is only used
to pass on the path of the group's memory.
"""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C import _distributed_c10d

from cluster.shared_memory import Segment, SharedMemory

BACKEND = "shm"
_PATH = "segment"

_REDUCTIONS = {
    dist.ReduceOp.SUM: lambda parts: parts.sum(0),
    dist.ReduceOp.MIN: lambda parts: parts.amin(0),
    dist.ReduceOp.MAX: lambda parts: parts.amax(0),
}


class SharedMemoryGroup(dist.ProcessGroup):
    """A process group whose operations are done when they return. It is `Direct` too (model/parallel.py)."""

    def __init__(self, memory: SharedMemory) -> None:
        super().__init__(memory.rank, memory.size)  # type: ignore[call-arg]
        self.memory = memory

    def sum_in_place(self, x: Tensor) -> Tensor:
        return self.memory.all_reduce(x)

    def gather_columns(self, x: Tensor) -> Tensor:
        whole = self.memory.gather(x, readers=1)
        return x if whole is None else whole

    def hand_over(self, x: Tensor, source: int, target: int) -> None:
        self.memory.broadcast(x, source, readers=1 << target)

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:  # type: ignore[override]
        op = dist.ReduceOp.SUM if opts is None else opts.reduceOp
        for x in tensors:
            if op == dist.ReduceOp.SUM and x.dtype in (torch.float32, torch.bfloat16) and x.is_contiguous():
                self.memory.all_reduce(x)
            else:
                x.copy_(self._reduced(x, op))
        return _done(tensors)

    def _reduced(self, x: Tensor, op: Any) -> Tensor:
        reductions = [reduction for known, reduction in _REDUCTIONS.items() if op == known]
        if not reductions:
            raise NotImplementedError(f"the {BACKEND} backend sums and takes extremes, but has no {op}")
        return reductions[0](self._parts(x).to(torch.float32 if x.is_floating_point() and x.itemsize < 4 else x.dtype))

    def _parts(self, x: Tensor) -> Tensor:
        """[size, *shape of x]: every rank's x."""
        gathered = self.memory.gather(x.detach().contiguous().view(1, -1))
        assert gathered is not None
        return gathered.view(self.memory.size, *x.shape)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> dist.Work:  # type: ignore[override]
        for into, x in zip(outputs, inputs, strict=True):
            for out, part in zip(into, self._parts(x), strict=True):
                out.copy_(part)
        return _done(outputs)

    def broadcast(self, tensors: list[Tensor], opts: Any) -> dist.Work:  # type: ignore[override]
        for x in tensors:
            whole = x if x.is_contiguous() else x.contiguous()
            x.copy_(self.memory.broadcast(whole, opts.rootRank))
        return _done(tensors)

    def barrier(self, opts: Any = None) -> dist.Work:
        self.memory.barrier()
        return _done([])

    def size(self) -> int:
        return self.memory.size

    def getBackendName(self) -> str:
        return BACKEND


def _done(result: Any) -> dist.Work:
    future: torch.futures.Future[Any] = torch.futures.Future()
    future.set_result(result)
    return _distributed_c10d._create_work_from_future(future)  # type: ignore[attr-defined]


def _create(store: dist.Store, rank: int, size: int, timeout: timedelta) -> SharedMemoryGroup:
    segment = Segment(size) if rank == 0 else None
    if segment is not None:
        store.set(_PATH, segment.path)
    memory = SharedMemory(store.get(_PATH).decode(), rank, size)
    memory.set_deadline(timeout.total_seconds())
    memory.barrier()
    if segment is not None:
        segment.close()
    return SharedMemoryGroup(memory)


def register() -> None:
    """Makes the backend known. Safe to call twice."""
    if not hasattr(dist.Backend, BACKEND.upper()):
        dist.Backend.register_backend(BACKEND, _create, devices="cpu")
