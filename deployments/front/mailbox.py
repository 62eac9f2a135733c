"""Where engines send this front's tokens: one inbox, one task that sorts deltas to their requests."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from cluster.channel import Address, Inbox
from deployments.engine.request import StepMessage, TokenDelta

logger = logging.getLogger(__name__)


class DeltaQueue:
    """Deltas of one request, for one reader."""

    def __init__(self) -> None:
        self._deltas: deque[TokenDelta] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._error: Exception | None = None

    def put(self, delta: TokenDelta) -> None:
        self._deltas.append(delta)
        self._wake()

    def fail(self, error: Exception) -> None:
        """`get` raises `error` once the deltas that came before are taken."""
        self._error = error
        self._wake()

    async def get(self) -> TokenDelta:
        while not self._deltas:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._deltas.popleft()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Mailbox:
    """All requests of a front. Belongs to the event loop that first opens a request.

    host: the address of this machine that engines can reach.
    """

    def __init__(self, host: str) -> None:
        self._host = host
        self._requests: dict[str, DeltaQueue] = {}
        self._heard: dict[str, float] = {}
        self._decode = msgspec.msgpack.Decoder(StepMessage).decode
        self._inbox: Inbox | None = None
        self._sorting: asyncio.Task[None] | None = None

    @property
    def address(self) -> Address:
        return self._opened().address

    def heard(self, engine: str) -> float:
        """When a message of this engine replica came last, on the monotonic clock; 0 if none ever did."""
        return self._heard.get(engine, 0.0)

    @contextmanager
    def open(self, request_id: str) -> Iterator[DeltaQueue]:
        """Deltas of `request_id` arrive while this is open; later ones are dropped."""
        self._opened()
        deltas = self._requests[request_id] = DeltaQueue()
        try:
            yield deltas
        finally:
            del self._requests[request_id]

    def close(self) -> None:
        if self._sorting is not None:
            self._sorting.cancel()
        if self._inbox is not None:
            self._inbox.close()
        self._inbox = self._sorting = None

    def _opened(self) -> Inbox:
        if self._inbox is None:
            self._inbox = Inbox(self._host)
            self._sorting = asyncio.get_running_loop().create_task(self._sort(self._inbox))
        return self._inbox

    async def _sort(self, inbox: Inbox) -> None:
        while True:
            message = await inbox.receive()
            try:
                self._deliver(self._decode(message))
            except Exception:  # invalid UTF-8 is no MsgspecError, and tokens of others must go on to arrive
                logger.exception("A message of %d bytes from an engine is malformed", len(message))

    def _deliver(self, step: StepMessage) -> None:
        self._heard[step.engine] = time.monotonic()
        for delta in step.deltas:
            deltas = self._requests.get(delta.request_id)
            if deltas is not None:
                deltas.put(delta)
