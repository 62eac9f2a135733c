"""One-way message channels between processes, over ZeroMQ: an `Inbox` receives, an `Outbox` sends.

Frames are bytes; whoever sends chooses a typed encoding (msgpack, raw tensor memory).
Nothing that arrives is unpickled. An inbox on a network address speaks CURVE: traffic is
encrypted, and only those who were given its public key (through Ray, which carries
control) can talk to it.
"""

import secrets
from dataclasses import dataclass
from typing import Any

import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

UNLIMITED = 0
"""High-water mark: a sender never drops a message; what is in flight is bounded by admission."""
PING_MS, PONG_MS = 500, 3000
"""How often a watched connection is tried, and how long the other end may take to answer."""


@dataclass(frozen=True)
class Address:
    """Where an inbox listens. `name` is unique to it, so that an outbox can be kept for each."""

    endpoint: str
    public_key: bytes
    name: str


class Inbox:
    """Receives messages on `host` (an address of this machine) for one asyncio task."""

    def __init__(self, host: str) -> None:
        public_key, secret_key = zmq.curve_keypair()
        self._socket = zmq.asyncio.Context.instance().socket(zmq.PULL)
        self._socket.set_hwm(UNLIMITED)
        self._socket.linger = 0
        self._socket.curve_server = True
        self._socket.curve_secretkey = secret_key
        port = self._socket.bind_to_random_port(f"tcp://{host}")
        self.address = Address(f"tcp://{host}:{port}", public_key, secrets.token_hex(8))

    async def receive(self) -> bytes:
        """The next message; waits for one."""
        return await self._socket.recv()

    def close(self) -> None:
        self._socket.close()


class Outbox:
    """Sends messages to one inbox. Not thread-safe: one thread owns it.

    is_watched: `is_connected` is kept up to date, and silence ends a connection: what is under way is lost then.
    """

    def __init__(self, address: Address, *, is_watched: bool = False) -> None:
        public_key, secret_key = zmq.curve_keypair()
        context: zmq.Context[Any] = zmq.Context.instance()
        self._socket = context.socket(zmq.PUSH)
        self._socket.set_hwm(UNLIMITED)
        self._socket.linger = 1000
        self._socket.curve_serverkey = address.public_key
        self._socket.curve_publickey = public_key
        self._socket.curve_secretkey = secret_key
        self._monitor: zmq.Socket[Any] | None = None
        self._is_connected = False
        if is_watched:
            self._socket.heartbeat_ivl, self._socket.heartbeat_timeout = PING_MS, PONG_MS
            self._monitor = self._socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self._socket.connect(address.endpoint)

    @property
    def is_connected(self) -> bool:
        """Whether the inbox is there: a killed process closes its connection at once. Of a watched outbox."""
        assert self._monitor is not None
        while self._monitor.poll(0):
            self._is_connected = recv_monitor_message(self._monitor)["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED
        return self._is_connected

    def send(self, message: bytes) -> None:
        """Queues `message` without waiting for the receiver."""
        self._socket.send(message, copy=True)

    def close(self) -> None:
        if self._monitor is not None:
            self._socket.disable_monitor()
            self._monitor.close()
        self._socket.close()
