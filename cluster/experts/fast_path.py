"""Compiles fast_path.cpp and calls it: nearly every layer of every step, on a client and on a server.

Without a compiler `available()` is False, and client.py and server.py do all of it.
"""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.experts.latency import BUCKETS, LatencyCounts
from cluster.experts.messages import DTYPES
from cluster.experts.routes import KEEP, ROWS_TOGETHER, Balance, Segment
from cluster.experts.weights import HeldExperts
from cluster.streams import Connection, Frame, memory
from model.kernels import build, cpu

CAPACITY = 1 << 17
"""Bytes of a frame at most: sockets take as many at once, and for more it matters little who handles them."""
MAX_ROWS = 512
"""Of a layer: a frame is sent from as many places in memory."""

_DTYPES = {getattr(torch, name): number for number, name in enumerate(DTYPES)}
_int, _int64, _float64, _pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


@functools.cache
def available() -> bool:
    """Whether this machine can compile it; does so on the first call."""
    return build.can_build(_library, "the fast path to expert servers is off, Python runs instead (slower)")


@functools.cache
def _library() -> ctypes.CDLL:
    library = build.library(Path(__file__).with_suffix(".cpp"), ["-pthread"])
    library.moray_deal.argtypes = [_pointer, _pointer, _int64, _pointer, _int64, _pointer]
    library.moray_deal.restype = None
    library.moray_send.argtypes = [_pointer, _pointer, _pointer, _int64, _int, _int, _int64]
    library.moray_collect.argtypes = [_pointer, _pointer, _pointer, _int64, _float64, _float64]
    library.moray_answer.argtypes = [_int, _pointer, _pointer]
    library.moray_answer.restype = None
    return library


class _Balance(ctypes.Structure):
    _fields_ = [
        *((name, _int64) for name in ("experts", "num_servers", "rows_together")),
        ("keep", _float64),
        *((name, _pointer) for name in ("first", "servers", "given")),
    ]


class _Exchange(ctypes.Structure):
    _fields_ = [
        *((name, _pointer) for name in ("order", "pieces", "parts", "buckets")),
        *((name, _int64) for name in ("num_parts", "num_buckets")),
        ("seconds_per_row", _float64),
    ]


class _Line(ctypes.Structure):
    _fields_ = [
        *((name, _int64) for name in ("fd", "capacity")),
        *((name, _pointer) for name in ("buffer", "latency_counts", "latency_sum")),
    ]


class _Held(ctypes.Structure):
    _fields_ = [
        *((name, _int64) for name in ("layers", "experts", "dim", "hidden", "dtype", "capacity")),
        *((name, _pointer) for name in ("w13", "w2", "rows", "buffer", "reply", "hidden_rows", "swiglus")),
    ]


class _Answer(ctypes.Structure):
    _fields_ = [("received", _int64), ("bytes", _int64), ("sent", _int64), ("seconds", _float64)]


class Part(NamedTuple):
    """Rows `start` to `stop` of those in order, which are with one server.

    sent: of `bytes`; received: bytes that wait in the line's buffer, and make no whole answer. Both -1 when the
    connection is of no more use. begun, answered: in seconds of the monotonic clock; answered -1: not yet.
    seconds: what the server took.
    """

    id: int
    server: int
    start: int
    stop: int
    first_piece: int
    pieces: int
    bytes: int
    sent: int
    received: int
    begun: float
    answered: float
    seconds: float

    @property
    def is_lost(self) -> bool:
        return self.sent < 0 or self.received < 0


_PART = np.dtype([(name, "f8" if kind is float else "i8") for name, kind in Part.__annotations__.items()])


class Lines:
    """To all servers of a table, by their places."""

    def __init__(self, connections: Sequence[Connection], latency: Sequence[LatencyCounts]) -> None:
        self._connections, self._latency = connections, latency
        self._buffers = torch.empty(len(connections), CAPACITY, dtype=torch.uint8)
        lines = [
            _Line(connection.fileno(), CAPACITY, buffer.data_ptr(), *counts.addresses())
            for connection, buffer, counts in zip(connections, self._buffers, latency, strict=True)
        ]
        self._array = (_Line * len(lines))(*lines)
        self.address = ctypes.addressof(self._array)

    @property
    def are_idle(self) -> bool:
        """Whether nothing is under way on them."""
        return all(connection.is_idle for connection in self._connections)

    def received(self, part: Part) -> list[Frame]:
        """What lies in the buffer, given to the connection. Raises Disconnected."""
        return self._connections[part.server].feed(memory(self._buffers[part.server])[: part.received])


class Exchange:
    """Rows of one layer at a time: sent by `begin`, back with `collect`."""

    def __init__(self) -> None:
        self._order = np.empty(MAX_ROWS, np.int64)
        self._pieces = np.empty((MAX_ROWS, 3), np.int64)
        self._parts = np.empty(MAX_ROWS, _PART)
        self._buckets = np.array(BUCKETS)
        arrays = (array.ctypes.data for array in (self._order, self._pieces, self._parts, self._buckets))
        self._exchange = _Exchange(*arrays, 0, len(BUCKETS), 0.0)
        self._address = ctypes.addressof(self._exchange)
        self._balances: dict[int, tuple[Balance, _Balance]] = {}
        """By layer, those it had last."""

    @staticmethod
    def takes(*tensors: Tensor) -> bool:
        return all(len(each) <= MAX_ROWS and each.nbytes <= CAPACITY // 2 and each.is_contiguous() for each in tensors)

    def begin(
        self, lines: Lines, balance: Balance, layer: int, x_kD: Tensor, experts_k: Tensor, routed_k: Tensor, id: int
    ) -> int:
        """Deals rows as `balance`, which is whole, and sends them. Ids count up from `id`; returns the next."""
        self.lines, self.layer, self.x_kD = lines, layer, x_kD
        self._row_bytes = x_kD.shape[1] * x_kD.itemsize
        rows = experts_k.data_ptr(), len(experts_k), routed_k.data_ptr(), len(routed_k)
        _library().moray_deal(self._balance(layer, balance), *rows, self._address)
        send = lines.address, x_kD.data_ptr(), self._row_bytes, layer, _DTYPES[x_kD.dtype], id
        self._is_sent = bool(_library().moray_send(self._address, *send))
        return id + int(self._exchange.num_parts)

    def collect(self, deadline: float, per_row: float) -> bool:
        """Waits for answers, for so many seconds; then they are in `out_kD`, and counted.

        Returns False when one is late, or something else has come.
        """
        self.out_kD = torch.empty_like(self.x_kD)
        out = self.out_kD.data_ptr(), self._row_bytes, deadline, per_row
        return self._is_sent and bool(_library().moray_collect(self._address, self.lines.address, *out))

    @property
    def seconds_per_row(self) -> float:
        """What servers take, by the answers of late."""
        return float(self._exchange.seconds_per_row)

    @seconds_per_row.setter
    def seconds_per_row(self, seconds: float) -> None:
        self._exchange.seconds_per_row = seconds

    def parts(self) -> list[Part]:
        return [Part(*part) for part in self._parts[: self._exchange.num_parts].tolist()]

    def order(self) -> NDArray[np.int64]:
        """int64 [k], which sorts the rows as parts name them."""
        return self._order[: len(self.x_kD)].copy()

    def segment(self, part: Part) -> Segment:
        pieces = self._pieces[part.first_piece : part.first_piece + part.pieces]
        return Segment(part.server, part.start, part.stop, pieces[:, 1].tolist(), pieces[:, 2].tolist())

    def _balance(self, layer: int, balance: Balance) -> int:
        """Its address."""
        if layer not in self._balances or self._balances[layer][0] is not balance:
            arrays = balance.first, balance.servers, balance.given
            addresses = (array.buffer_info()[0] for array in arrays)
            numbers = balance.num_experts, len(balance.given) - 1, ROWS_TOGETHER, KEEP
            self._balances[layer] = balance, _Balance(*numbers, *addresses)
        return ctypes.addressof(self._balances[layer][1])


class Answering:
    """Of calls for packed experts."""

    def __init__(self, experts: HeldExperts) -> None:
        rows = CAPACITY // (experts.dim * experts.dtype.itemsize)
        self._experts = experts
        self._buffers = torch.empty(2, CAPACITY, dtype=torch.uint8)
        self._hidden = torch.empty(rows, experts.hidden_dim, dtype=experts.dtype)
        self._held = _Held(
            *experts.rows.shape, experts.dim, experts.hidden_dim, _DTYPES[experts.dtype], CAPACITY,
            *(array.ctypes.data for array in (*experts.addresses, experts.rows)),
            *(tensor.data_ptr() for tensor in (*self._buffers, self._hidden)), cpu.swiglus_address(),
        )  # fmt: skip
        self._answer = _Answer()
        self._addresses = ctypes.addressof(self._held), ctypes.addressof(self._answer)

    def answer(self, connection: Connection) -> float | list[Frame]:
        """Answers the call that has come over an idle connection: the seconds that it took.

        Returns frames where they are no such call, none when nothing whole has come. Raises Disconnected.
        """
        with self._experts.lock:
            _library().moray_answer(connection.fileno(), *self._addresses)
        buffer, reply = map(memory, self._buffers)
        answer = self._answer
        if not answer.bytes:
            return connection.feed(buffer[: answer.received]) if answer.received else connection.receive()
        if answer.sent < answer.bytes:
            connection.queue(memoryview(bytes(reply[max(answer.sent, 0) : answer.bytes])))
        return float(answer.seconds)
