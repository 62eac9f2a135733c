"""One expert server: takes rows from clients, runs them through the experts it holds, sends them back.

One thread reads, computes and answers. What a client sends that makes no sense is refused or ends
that client's connection; it never ends the server.
"""

import itertools
import logging
import os
import secrets
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch

from cluster.experts import fast_path
from cluster.experts.messages import Call, Refusal, Reply, decode_call
from cluster.experts.table import ServerAddress, Unit
from cluster.experts.weights import HeldExperts, NotHeld
from cluster.streams import KEY_BYTES, Connection, Disconnected, Frame, Handshake, memory, tune
from model.kernels import cpu

logger = logging.getLogger(__name__)

BACKLOG = 128
HANDSHAKE_SECONDS = 2.0
"""For a client to prove itself."""
MAX_UNPROVED = 64
"""Clients in their handshakes; when there are more, the oldest is hung up."""
DEAF_SECONDS = 1.0
"""For which nobody is accepted after that has failed, as it does when the process has no descriptors left."""


class ExpertServer:
    """Listens from construction on; answers from `start` to `stop`.

    host: an address of this machine. Clients on the same one use a Unix socket.
    num_threads: torch's, in the computing thread.
    """

    def __init__(self, experts: HeldExperts, host: str, name: str | None = None, num_threads: int = 1) -> None:
        self._experts, self._num_threads = experts, num_threads
        self._unix = socket.socket(socket.AF_UNIX)
        unix = f"moray-{secrets.token_hex(16)}"
        self._unix.bind(f"\0{unix}")  # a name without a file: nothing is left of it, however this process ends
        self._tcp = socket.socket(socket.AF_INET)
        self._tcp.bind((host, 0))
        for listener in (self._unix, self._tcp):
            listener.listen(BACKLOG)
            listener.setblocking(False)
        self.address = ServerAddress(
            id=name or secrets.token_hex(4),
            host=host,
            unix=f"unix:{unix}",
            tcp=f"tcp:{host}:{self._tcp.getsockname()[1]}",
            key=secrets.token_bytes(KEY_BYTES),
        )
        self._fast = fast_path.Answering(experts) if experts.are_packed and fast_path.available() else None
        self.calls = self.refusals = self.waiting = 0
        self.busy_seconds = 0.0
        self._epoll = select.epoll()
        self._ready: dict[int, Callable[[int], None]] = {}
        self._clients: dict[int, socket.socket] = {}
        self._unproved: dict[int, float] = {}
        """Until when each may take for its handshake, oldest first."""
        self._deaf_until: float | None = None
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="expert-server", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends after the call under way; clients see closed connections. Safe to call twice."""
        if self._stopping:
            return
        self._stopping = True
        os.eventfd_write(self._wake, 1)
        if self._thread.is_alive():
            self._thread.join()
        os.close(self._wake)

    @property
    def rows(self) -> Counter[Unit]:
        """Computed since the start, for any thread to read."""
        rows = self._experts.rows.copy()
        return Counter({(layer, expert): rows[layer, expert].item() for layer, expert in np.argwhere(rows).tolist()})

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @torch.inference_mode()
    def _run(self) -> None:
        cpu.set_num_threads(self._num_threads)
        self._listen()
        self._watch(self._wake, lambda _events: None)
        while not self._stopping:
            events = self._epoll.poll(self._until_due())
            for served, (fd, event) in enumerate(events, 1):
                self.waiting = len(events) - served
                ready = self._ready.get(fd)
                if ready is not None:
                    ready(event)
            self._do_due()
        self._epoll.close()
        for stream in (self._unix, self._tcp, *self._clients.values()):
            stream.close()

    def _watch(self, fd: int, ready: Callable[[int], None]) -> None:
        self._ready[fd] = ready
        self._epoll.register(fd, select.EPOLLIN)

    def _listen(self) -> None:
        self._deaf_until = None
        self._watch(self._unix.fileno(), lambda _events: self._accept(self._unix))
        self._watch(self._tcp.fileno(), lambda _events: self._accept(self._tcp))

    def _be_deaf(self) -> None:
        for listener in (self._unix, self._tcp):
            del self._ready[listener.fileno()]
            self._epoll.unregister(listener.fileno())
        self._deaf_until = time.monotonic() + DEAF_SECONDS

    def _until_due(self) -> float | None:
        """Seconds to what `_do_due` has to do next; None when that is nothing."""
        due = [*itertools.islice(self._unproved.values(), 1), *([] if self._deaf_until is None else [self._deaf_until])]
        return max(min(due) - time.monotonic(), 0.0) if due else None

    def _do_due(self) -> None:
        if not self._unproved and self._deaf_until is None:
            return
        now = time.monotonic()
        for fd in [fd for fd, until in self._unproved.items() if until <= now]:
            logger.warning("a client was turned away: it did not prove itself in %.0f s", HANDSHAKE_SECONDS)
            self._hang_up(fd)
        if self._deaf_until is not None and self._deaf_until <= now:
            self._listen()

    def _hang_up(self, fd: int) -> None:
        self._unproved.pop(fd, None)
        del self._ready[fd]
        self._epoll.unregister(fd)
        self._clients.pop(fd).close()

    def _accept(self, listener: socket.socket) -> None:
        try:
            stream, _ = listener.accept()
        except (BlockingIOError, ConnectionError):
            return  # it is gone already
        except OSError as error:
            logger.warning("a client could not be accepted: %s", error)
            self._be_deaf()
            return
        if stream.family == socket.AF_INET:
            tune(stream)
        try:
            handshake = Handshake(stream, self.address.key)
        except OSError:
            stream.close()
            return
        if len(self._unproved) >= MAX_UNPROVED:
            self._hang_up(next(iter(self._unproved)))
        self._clients[stream.fileno()] = stream
        self._unproved[stream.fileno()] = time.monotonic() + HANDSHAKE_SECONDS
        self._watch(stream.fileno(), lambda _events: self._greet(handshake))

    def _greet(self, handshake: Handshake) -> None:
        fd = handshake.stream.fileno()
        try:
            if not handshake.advance():
                return
        except (Disconnected, OSError) as error:
            logger.warning("a client was turned away: %s", error)
            self._hang_up(fd)
            return
        del self._unproved[fd]
        connection = Connection(handshake.stream)
        self._ready[fd] = lambda events: self._serve(connection, events)

    def _serve(self, connection: Connection, events: int) -> None:
        try:
            if events & select.EPOLLOUT:
                connection.flush()
            if events & ~select.EPOLLOUT:
                for frame in self._answer_fast(connection):
                    self._answer(connection, frame)
            wanted = select.EPOLLIN | (select.EPOLLOUT if connection.is_sending else 0)
            if wanted != select.EPOLLIN or events & select.EPOLLOUT:
                self._epoll.modify(connection.fileno(), wanted)
        except Disconnected as error:
            logger.info("a client is gone: %s", error)
            self._hang_up(connection.fileno())

    def _answer_fast(self, connection: Connection) -> list[Frame]:
        """Answers one call, if it is as usual. Returns frames that are not."""
        if self._fast is None or not connection.is_idle:
            return connection.receive()
        answered = self._fast.answer(connection)
        if isinstance(answered, list):
            return answered
        self._count(answered)
        return []

    def _count(self, seconds: float) -> None:
        self.calls += 1
        self.busy_seconds += seconds

    def _answer(self, connection: Connection, frame: Frame) -> None:
        call = decode_call(frame.header)
        begun = time.perf_counter()
        try:
            out = self._experts.compute(call.layer, call.experts, call.counts, self._rows(call, frame))
        except NotHeld as error:
            self._refuse(connection, Refusal(call.id, "not_held", str(error)))
        except ValueError as error:
            logger.warning("refused a call: %s", error)
            self._refuse(connection, Refusal(call.id, "invalid", str(error)))
        except Exception as error:
            logger.exception("a call to layer %d failed", call.layer)
            self._refuse(connection, Refusal(call.id, "failed", f"{type(error).__name__}: {error}"))
        else:
            seconds = time.perf_counter() - begun
            connection.send(Reply(call.id, seconds).encode(), memory(out))
            self._count(seconds)

    def _refuse(self, connection: Connection, refusal: Refusal) -> None:
        self.refusals += 1
        connection.send(refusal.encode())

    def _rows(self, call: Call, frame: Frame) -> torch.Tensor:
        """The payload as [rows, dim]. Raises ValueError when it is not what the call says."""
        dtype, dim = self._experts.dtype, self._experts.dim
        if getattr(torch, call.dtype) is not dtype:
            raise ValueError(f"rows are {call.dtype}, the experts are {dtype}")
        if len(call.experts) != len(call.counts) or any(count <= 0 for count in call.counts):
            raise ValueError(f"counts {call.counts} do not go with experts {call.experts}")
        wanted = sum(call.counts) * dim * dtype.itemsize
        if len(frame.payload) != wanted:
            raise ValueError(
                f"{sum(call.counts)} rows of {dim} {call.dtype} are {wanted} bytes, not {len(frame.payload)}"
            )
        if not wanted:  # `frombuffer` takes no empty one
            return torch.empty(0, dim, dtype=dtype)
        return torch.frombuffer(frame.payload, dtype=dtype).view(-1, dim)
