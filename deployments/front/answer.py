"""What the two generating endpoints have in common: an answer as one JSON object, or as a stream of events.

An answer is abandoned as soon as its client goes away, which closes the generator below and so
aborts the request in the engine. Under Serve that news comes as a cancellation of the whole call,
under a plain ASGI server as an `http.disconnect` message; both end here.
"""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from deployments.front.choice import Piece
from deployments.front.errors import INTERNAL, ApiError, from_engine
from deployments.front.generation import Generation

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
"""A comment, which clients skip."""
KEEP_ALIVE_SECONDS = 10.0
"""A stream that waits for tokens for longer, in a queue or for an engine, tells so, lest somebody cut it."""
EVENT_STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class AnswerFormat(ABC):
    """Writes one request's answer in the JSON of its endpoint."""

    def opening(self) -> bytes:
        """Events before the first piece."""
        return b""

    @abstractmethod
    def event(self, piece: Piece) -> bytes:
        """The event of a piece; nothing when it has no news."""

    @abstractmethod
    def closing(self) -> bytes:
        """Events after the last piece."""

    @abstractmethod
    def whole(self, pieces: list[Piece]) -> bytes:
        """The JSON object of an answer that is not streamed."""


class Answer(Response):
    """Generates while it responds. Errors before the first byte are raised as ApiError, with their status."""

    def __init__(self, generation: Generation, form: AnswerFormat) -> None:
        super().__init__()
        self._generation = generation
        self._form = form

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self._work(scope, receive, send))
        watch = asyncio.ensure_future(_disconnection(receive))
        try:
            await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
        finally:
            watch.cancel()
            if not work.done():
                work.cancel()
            await asyncio.wait((work, watch))
        if not work.cancelled():
            work.result()

    async def _work(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(self._generation.pieces()) as pieces:
                body = self._form.whole([piece async for piece in pieces])
        except Exception as error:
            raise from_engine(error) from error
        await Response(body, media_type="application/json")(scope, receive, send)


class StreamedAnswer(Answer):
    """Server-sent events. Once it has begun, a failure is an event with an `error`, after which nothing comes."""

    async def _work(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._generation.pieces()) as pieces:
            # Nothing is sent before the engine has taken the request, so that a refusal has its proper status.
            try:
                first = await anext(pieces)
            except Exception as error:
                raise from_engine(error) from error
            await _start(send)
            line = _Line(send)
            keeping = asyncio.ensure_future(line.keep_alive())
            try:
                await self._stream(first, pieces, line)
            finally:
                keeping.cancel()

    async def _stream(self, first: Piece, pieces: AsyncGenerator[Piece, None], line: "_Line") -> None:
        event = self._form.event
        end = b""
        try:
            await line.send(self._form.opening() + event(first))
            async for piece in pieces:
                await line.send(event(piece))
            end = self._form.closing() + DONE
        except Exception as error:
            end = b"data: " + _told(error).body + b"\n\n"
        await line.send(end, is_last=True)


class _Line:
    """To the client, once the response has started."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._num_sent = 0

    async def send(self, data: bytes, is_last: bool = False) -> None:
        if data or is_last:
            self._num_sent += 1
            await self._send({"type": "http.response.body", "body": data, "more_body": not is_last})

    async def keep_alive(self) -> None:
        """Until it is cancelled."""
        while True:
            before = self._num_sent
            await asyncio.sleep(KEEP_ALIVE_SECONDS)
            if self._num_sent == before:
                await self.send(KEEP_ALIVE)


def _told(error: Exception) -> ApiError:
    try:
        return from_engine(error)
    except Exception:
        logger.exception("A stream failed")
        return INTERNAL


async def _start(send: Send) -> None:
    headers = {"content-type": "text/event-stream; charset=utf-8", **EVENT_STREAM_HEADERS}
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": 200, "headers": raw})


async def _disconnection(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
