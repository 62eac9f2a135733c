"""Typed tensor frames over a stream socket: a small header and raw tensor memory, nothing pickled.

On one host the stream is a Unix socket in Linux's abstract namespace; between hosts it is TCP.
Both ends prove that they know a key that came through Ray, which carries control. The kernel
closes a dead process's sockets at once, so a closed connection is how a death shows first. A
message costs one system call on each side and wakes one thread.

A frame: magic (4 bytes), length of the header (4), length of the payload (8), the header, zeros
up to a multiple of 16, the payload. Integers are little-endian.
"""

import hashlib
import hmac
import secrets
import socket
import struct
from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAGIC = b"MRY1"
MAX_HEADER = 1 << 20
MAX_PAYLOAD = 1 << 31
KEY_BYTES = 32
_PREFIX = struct.Struct("<4sIQ")
_ALIGN = 16
_MAC_BYTES = 32
_EMPTY = memoryview(b"")
_ZEROS = [bytes(-length % _ALIGN) for length in range(_ALIGN)]
"""What fills a header up, by its length; the prefix is as long as `_ALIGN`."""


class Disconnected(Exception):
    """The other end is gone, or sent what is no frame. The message says which."""


class Frame(NamedTuple):
    """header: in the encoding of whoever sent it. Both are bytes, and valid until the next `receive` or `feed`."""

    header: memoryview
    payload: memoryview


class Connection:
    """One end of a stream, which is never waited for: `send` keeps what the kernel does not take yet.

    Belongs to one thread.
    """

    def __init__(self, stream: socket.socket) -> None:
        stream.setblocking(False)
        self._stream = stream
        self._unsent: deque[memoryview] = deque()
        self._buffer = _aligned(1 << 16)
        self._start = self._end = 0

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def is_sending(self) -> bool:
        """Whether `flush` should be called when the socket takes more."""
        return bool(self._unsent)

    @property
    def is_idle(self) -> bool:
        """Whether it holds nothing: others may use the socket, if they leave what they do not finish to this."""
        return not self._unsent and self._start == self._end

    def send(self, header: bytes, payload: memoryview = _EMPTY) -> None:
        """Queues a frame and sends what goes. payload: bytes, not to be changed while `is_sending`.

        Raises Disconnected.
        """
        head = frame_head(header, payload)
        if self._unsent:
            self._unsent += (memoryview(head), payload)
            return
        sent = self._try_send(head, payload)
        if sent < len(head) + len(payload):
            self._unsent += (memoryview(head)[sent:], payload[max(0, sent - len(head)) :])

    def queue(self, rest: memoryview) -> None:
        """The rest of a frame whose beginning was sent over the socket itself. Not to be changed while `is_sending`."""
        self._unsent.append(rest)

    def flush(self) -> None:
        """Sends more of what is queued. Raises Disconnected."""
        while self._unsent:
            part = self._unsent[0]
            sent = self._try_send(part)
            if sent < len(part):
                self._unsent[0] = part[sent:]
                return
            self._unsent.popleft()

    def receive(self) -> list[Frame]:
        """Whole frames that have arrived. Raises Disconnected when there will be no more."""
        self._make_room()
        try:
            read = self._stream.recv_into(self._buffer[self._end :])
        except BlockingIOError:
            return []
        except OSError as error:
            raise Disconnected(str(error)) from error
        if not read:
            raise Disconnected("the other end closed the connection")
        self._end += read
        return self._frames()

    def feed(self, received: memoryview) -> list[Frame]:
        """As `receive`, of bytes that were read from the socket itself."""
        while received:
            self._make_room()
            room = self._buffer[self._end : self._end + len(received)]
            room[:] = received[: len(room)]
            self._end, received = self._end + len(room), received[len(room) :]
        return self._frames()

    def close(self) -> None:
        self._stream.close()

    def _frames(self) -> list[Frame]:
        frames = []
        while (frame := self._next()) is not None:
            frames.append(frame)
        return frames

    def _try_send(self, *parts: bytes | memoryview) -> int:
        try:
            return self._stream.sendmsg(parts)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise Disconnected(str(error)) from error

    def _next(self) -> Frame | None:
        header = self._start + _PREFIX.size
        if (lengths := self._lengths()) is None or self._end < header + sum(lengths):
            return None
        payload = header + lengths.header + lengths.padding
        self._start = payload + lengths.payload
        return Frame(self._buffer[header : header + lengths.header], self._buffer[payload : self._start])

    def _lengths(self) -> "_Lengths | None":
        """Of the frame that starts at `_start`, if its prefix is there."""
        if self._end - self._start < _PREFIX.size:
            return None
        magic, header, payload = _PREFIX.unpack_from(self._buffer, self._start)
        if magic != MAGIC or header > MAX_HEADER or payload > MAX_PAYLOAD:
            raise Disconnected(
                f"the other end sent what is no frame: {bytes(self._buffer[self._start : self._start + 16])!r}"
            )
        return _Lengths(header, -header % _ALIGN, payload)

    def _make_room(self) -> None:
        """Moves an incomplete frame to the front of the buffer, and makes the buffer large enough for it."""
        held = self._end - self._start
        if not held:
            self._start = self._end = 0
            return
        needed = max(_PREFIX.size + sum(self._lengths() or ()), held + 1)
        if self._start == 0 and needed <= len(self._buffer):
            return
        rest = bytes(self._buffer[self._start : self._end])
        if needed > len(self._buffer):
            self._buffer = _aligned(max(needed, 2 * len(self._buffer)))
        self._buffer[:held] = rest
        self._start, self._end = 0, held


def frame_head(header: bytes, payload: memoryview) -> bytes:
    """What a frame has before its payload."""
    return _PREFIX.pack(MAGIC, len(header), len(payload)) + header + _ZEROS[len(header) % _ALIGN]


class _Lengths(NamedTuple):
    """Bytes of the parts of a frame after its prefix."""

    header: int
    padding: int
    payload: int


class Handshake:
    """The listening side's half of proving that both ends know `key`. Never blocks."""

    def __init__(self, stream: socket.socket, key: bytes) -> None:
        stream.setblocking(False)
        self.stream, self._key = stream, key
        self._challenge = secrets.token_bytes(KEY_BYTES)
        self._received = b""
        stream.send(self._challenge)

    def advance(self) -> bool:
        """Reads what has arrived; True when the other end has proved itself. Raises Disconnected."""
        try:
            more = self.stream.recv(KEY_BYTES + _MAC_BYTES - len(self._received))
        except BlockingIOError:
            return False
        except OSError as error:
            raise Disconnected(str(error)) from error
        if not more:
            raise Disconnected("the other end closed the connection in the handshake")
        self._received += more
        if len(self._received) < KEY_BYTES + _MAC_BYTES:
            return False
        challenge, proof = self._received[:KEY_BYTES], self._received[KEY_BYTES:]
        if not hmac.compare_digest(proof, _prove(self._key, b"connects", self._challenge, challenge)):
            raise Disconnected("the other end does not know the key")
        self.stream.send(_prove(self._key, b"listens", self._challenge, challenge))
        return True


def connect(endpoint: str, key: bytes, timeout: float) -> Connection:
    """To `unix:NAME` or `tcp:HOST:PORT`. Waits at most `timeout` seconds for each answer.

    Raises Disconnected when nobody answers in time, whoever does has another key, or no descriptor is left.
    """
    kind, _, place = endpoint.partition(":")
    stream: socket.socket | None = None
    try:
        stream = socket.socket(socket.AF_UNIX if kind == "unix" else socket.AF_INET)
        stream.settimeout(timeout)
        if kind == "unix":
            stream.connect(f"\0{place}")
        else:
            host, _, port = place.rpartition(":")
            stream.connect((host, int(port)))
            tune(stream)
        theirs = _receive_exactly(stream, KEY_BYTES)
        ours = secrets.token_bytes(KEY_BYTES)
        stream.sendall(ours + _prove(key, b"connects", theirs, ours))
        if not hmac.compare_digest(_receive_exactly(stream, _MAC_BYTES), _prove(key, b"listens", theirs, ours)):
            raise Disconnected("the other end does not know the key")
    except (OSError, Disconnected) as error:
        if stream is not None:
            stream.close()
        raise Disconnected(f"{endpoint}: {error}") from error
    return Connection(stream)


def tune(stream: socket.socket) -> None:
    """For small messages over TCP, and to notice a silent loss of the other host in seconds, not hours."""
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 5000)
    for option, value in ((socket.TCP_KEEPIDLE, 2), (socket.TCP_KEEPINTVL, 1), (socket.TCP_KEEPCNT, 3)):
        stream.setsockopt(socket.IPPROTO_TCP, option, value)


def memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, which lives as long as they do."""
    array: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _aligned(size: int) -> memoryview:
    """So many bytes, which begin where a cache line does."""
    return memory(torch.empty(size, dtype=torch.uint8))


def _prove(key: bytes, role: bytes, listener: bytes, connector: bytes) -> bytes:
    return hmac.new(key, role + listener + connector, hashlib.sha256).digest()


def _receive_exactly(stream: socket.socket, count: int) -> bytes:
    received = b""
    while len(received) < count:
        more = stream.recv(count - len(received))
        if not more:
            raise Disconnected("it closed the connection in the handshake")
        received += more
    return received
