"""Collectives between processes of one host through memory they share (shared_memory.cpp).

The memory has no name: the first rank makes it, the others open it through `/proc`, and it is gone
with the last of them, however they end.
"""

import ctypes
import functools
import os
import threading
from pathlib import Path

import torch
from torch import Tensor

from model.kernels import build

MAX_RANKS = 64
SPIN_NS = 100_000
"""How long a rank that has a CPU to itself waits awake: about what a layer's skew takes."""
SPIN_CROWDED_NS = 2_000
"""The same where ranks outnumber CPUs, and the one waited for may need this one."""
ALIVE_SECONDS = 0.1
"""Between two signs of life."""
PATIENCE = 30.0
"""Deadlines that a rank may be late while it gives signs of life: a step takes no longer, so it hangs."""
EVERYONE = (1 << MAX_RANKS) - 1
"""A bit for each rank."""


class RankLost(Exception):
    """A rank of the group died or did not answer in time; the group is of no more use."""


@functools.cache
def available() -> bool:
    """Whether this machine can compile the collectives; does so on the first call."""
    return build.can_build(_library, "shared-memory collectives are off, gloo runs instead (far slower)")


@functools.cache
def _library() -> ctypes.CDLL:
    library = build.library(Path(__file__).with_name("shared_memory.cpp"), ["-pthread"])
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.moray_segment_bytes.argtypes = [number]
    library.moray_segment_bytes.restype = size
    library.moray_join.argtypes = [number, number, number, size]
    library.moray_join.restype = pointer
    library.moray_leave.argtypes = [pointer]
    library.moray_leave.restype = None
    library.moray_set_deadline.argtypes = [pointer, size, size]
    library.moray_set_deadline.restype = None
    library.moray_alive.argtypes = [pointer]
    library.moray_alive.restype = None
    library.moray_abort.argtypes = [pointer]
    library.moray_abort.restype = None
    library.moray_all_reduce_bf16.argtypes = [pointer, pointer, size]
    library.moray_all_reduce_float.argtypes = [pointer, pointer, size]
    library.moray_broadcast.argtypes = [pointer, pointer, size, number, ctypes.c_uint64]
    library.moray_gather.argtypes = [pointer, pointer, size, size, pointer, ctypes.c_uint64]
    library.moray_barrier.argtypes = [pointer]
    return library


class Segment:
    """Zeroed shared memory for a group of `size` ranks, made by one of them. `path` opens it from another process."""

    def __init__(self, size: int) -> None:
        if size > MAX_RANKS:
            raise ValueError(f"shared memory takes at most {MAX_RANKS} ranks, not {size}")
        self.descriptor = os.memfd_create("moray-ranks", os.MFD_CLOEXEC)
        os.ftruncate(self.descriptor, _library().moray_segment_bytes(size))
        self.path = f"/proc/{os.getpid()}/fd/{self.descriptor}"

    def close(self) -> None:
        """Forgets the way in; those who joined stay."""
        os.close(self.descriptor)


class SharedMemory:
    """One rank's place in a group. All ranks call the same operations in the same order, one thread each. Another
    thread tells the other ranks that this process lives, also while it computes.

    path: of the group's `Segment`. spin_ns: None decides by the CPUs there are.
    Every operation raises RankLost when a rank misses the deadline, or after `abort`.
    """

    def __init__(self, path: str, rank: int, size: int, spin_ns: int | None = None) -> None:
        self.rank, self.size = rank, size
        if spin_ns is None:
            spin_ns = SPIN_NS if size <= len(os.sched_getaffinity(0)) else SPIN_CROWDED_NS
        self._library = library = _library()
        self._sums = {torch.bfloat16: library.moray_all_reduce_bf16, torch.float32: library.moray_all_reduce_float}
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._group = self._library.moray_join(descriptor, rank, size, spin_ns)
        finally:
            os.close(descriptor)
        if not self._group:
            raise OSError(f"cannot map {path}")
        self._closing = threading.Event()
        self._living = threading.Thread(target=self._live, name="rank-alive", daemon=True)
        self._living.start()

    def set_deadline(self, seconds: float, patience: float = PATIENCE) -> None:
        """How long others may give no sign of life, and `patience` times that how late they may be at all; there is no
        limit until it is set."""
        self._library.moray_set_deadline(self._group, int(seconds * 1e9), int(seconds * patience * 1e9))

    def abort(self) -> None:
        """Ends what this process waits for, and all it would wait for later. From any thread."""
        self._library.moray_abort(self._group)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks, in x: float32 or bfloat16 (summed in float32, rounded once), contiguous.

        Summed in the order of ranks: all get the same bits, whatever else is in x.
        """
        total = self._sums.get(x.dtype)
        if total is None:
            raise TypeError(f"cannot sum {x.dtype} in shared memory")
        self._check(total(self._group, _contiguous(x).data_ptr(), x.numel()))
        return x

    def broadcast(self, x: Tensor, root: int, readers: int = EVERYONE) -> Tensor:
        """x of `root` in x, contiguous, any dtype. readers: a bit for each rank that wants it."""
        self._check(self._library.moray_broadcast(self._group, _contiguous(x).data_ptr(), x.nbytes, root, readers))
        return x

    def gather(self, x: Tensor, readers: int = EVERYONE) -> Tensor | None:
        """[rows, size * columns], the ranks' x [rows, columns] side by side; None where it is not wanted.

        readers: a bit for each rank that wants it.
        """
        rows, columns = x.shape
        out = x.new_empty(rows, self.size * columns) if readers >> self.rank & 1 else None
        into = None if out is None else out.data_ptr()
        self._check(
            self._library.moray_gather(
                self._group, _contiguous(x).data_ptr(), rows, columns * x.itemsize, into, readers
            )
        )
        return out

    def barrier(self) -> None:
        """Returns when every rank has called it."""
        self._check(self._library.moray_barrier(self._group))

    def close(self) -> None:
        """Unmaps the memory. Nothing may wait or be called any more."""
        self._closing.set()
        self._living.join()
        self._library.moray_leave(self._group)

    def _live(self) -> None:
        while not self._closing.wait(ALIVE_SECONDS):
            self._library.moray_alive(self._group)

    def _check(self, fault: int) -> None:
        if fault > 0:
            raise RankLost(f"rank {fault - 1} of {self.size} did not answer before the deadline")
        if fault:
            raise RankLost("the group was aborted")


def _contiguous(x: Tensor) -> Tensor:
    if not x.is_contiguous():
        raise ValueError("collectives need a contiguous tensor")
    return x
