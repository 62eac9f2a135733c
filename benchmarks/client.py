"""A neutral load client for streaming `/v1/completions`, written to use little CPU.

It shares the machine with the server it measures. While the clock runs it does no more than
note when bytes arrive; HTTP and JSON are taken apart, and checked, after the load has ended.
Knows nothing of any server beyond the OpenAI API.
"""

import asyncio
import json
import re
import time
from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise
from urllib.parse import urlsplit

SUCCESS = b"HTTP/1.1 200"
END_OF_BODY = b"\r\n0\r\n\r\n"
EVENT = re.compile(rb"data: ?([^\r\n]*)\r?\n\r?\n")


class BadResponse(Exception):
    """A server answered something other than a complete stream with the number of tokens asked for."""


@dataclass(frozen=True)
class Stream:
    """One answered request. Times are seconds of `time.perf_counter`."""

    started: float
    token_times: list[float]
    """When each event that carried output arrived."""
    num_prompt_tokens: int
    num_output_tokens: int

    @property
    def time_to_first_token(self) -> float:
        return self.token_times[0] - self.started

    @property
    def inter_token_latencies(self) -> list[float]:
        return [later - earlier for earlier, later in pairwise(self.token_times)]


@dataclass
class _Exchange:
    """Bytes of one response as they arrived: (time, total length so far) for each read."""

    started: float
    body: bytearray = field(default_factory=bytearray)
    reads: list[tuple[float, int]] = field(default_factory=list)


class _Connection(asyncio.Protocol):
    """One keep-alive HTTP/1.1 connection that carries one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._exchange: _Exchange | None = None
        self._done: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self._exchange is None or self._done is None:
            return
        self._exchange.body += data
        self._exchange.reads.append((time.perf_counter(), len(self._exchange.body)))
        complete = self._exchange.body.endswith(END_OF_BODY) or not self._exchange.body.startswith(SUCCESS)
        if complete and not self._done.done():
            self._done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            received = bytes(self._exchange.body[-2000:]) if self._exchange else b""
            self._done.set_exception(BadResponse(f"connection closed in the middle of a response: {received!r}"))

    async def exchange(self, request: bytes, timeout: float) -> _Exchange:
        assert self._transport is not None
        self._done = asyncio.get_running_loop().create_future()
        self._exchange = _Exchange(time.perf_counter())
        self._transport.write(request)
        try:
            await asyncio.wait_for(self._done, timeout)
        except TimeoutError:
            raise BadResponse(
                f"no complete answer in {timeout} s, got {bytes(self._exchange.body[-2000:])!r}"
            ) from None
        return self._exchange

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


def request_bytes(base_url: str, payload: dict[str, object]) -> bytes:
    """A POST of `payload` to `/v1/completions`, ready to send."""
    url = urlsplit(base_url)
    body = json.dumps(payload).encode()
    head = (
        f"POST {url.path.rstrip('/')}/v1/completions HTTP/1.1\r\nHost: {url.netloc}\r\n"
        f"Content-Type: application/json\r\nAccept: text/event-stream\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def completion(model: str, prompt: str, num_output_tokens: int) -> dict[str, object]:
    """A greedy streaming completion of exactly `num_output_tokens` tokens."""
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": num_output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def run_load(base_url: str, payloads: list[dict[str, object]], concurrency: int, timeout: float = 300) -> "Load":
    """Sends `payloads` with `concurrency` requests in flight until all are answered.

    Raises `BadResponse` when any answer is not a complete stream of the asked number of tokens.
    """
    url = urlsplit(base_url)
    host, port = url.hostname or "127.0.0.1", url.port or 80
    waiting = deque((payload, request_bytes(base_url, payload)) for payload in payloads)
    connections = [
        (await asyncio.get_running_loop().create_connection(_Connection, host, port))[1]
        for _ in range(min(concurrency, len(payloads)))
    ]
    answered: list[tuple[dict[str, object], _Exchange]] = []

    async def work(connection: _Connection) -> None:
        while waiting:
            payload, request = waiting.popleft()
            answered.append((payload, await connection.exchange(request, timeout)))

    cpu_before, started = time.process_time(), time.perf_counter()
    try:
        await asyncio.gather(*(work(connection) for connection in connections))
    finally:
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu_before
        for connection in connections:
            connection.close()
    return Load(seconds, cpu, [parse(exchange, payload) for payload, exchange in answered])


@dataclass(frozen=True)
class Load:
    """All streams of one run, its length, and the CPU seconds the client itself used."""

    seconds: float
    client_cpu_seconds: float
    streams: list[Stream]


def parse(exchange: _Exchange, payload: dict[str, object]) -> Stream:
    """Takes one response apart and checks that it is complete."""
    head, _, body = bytes(exchange.body).partition(b"\r\n\r\n")
    if not head.startswith(SUCCESS):
        raise BadResponse(f"{head.decode()}\n{body.decode()}")
    if b"transfer-encoding: chunked" not in head.lower():
        raise BadResponse(f"not a chunked response: {head.decode()}")
    events = _events(exchange, len(head) + 4, body)
    if not events or events[-1][1] != "[DONE]":
        raise BadResponse(f"stream ended without [DONE]: {events[-1:]}")
    token_times, usage = [], None
    for when, event in events[:-1]:
        message = json.loads(event)
        if "error" in message:
            raise BadResponse(event)
        if message.get("choices"):
            token_times.append(when)
        usage = message.get("usage") or usage
    if usage is None or usage["completion_tokens"] != payload["max_tokens"] or not token_times:
        raise BadResponse(f"asked for {payload['max_tokens']} tokens, usage says {usage}")
    return Stream(exchange.started, token_times, usage["prompt_tokens"], usage["completion_tokens"])


def _events(exchange: _Exchange, head_length: int, body: bytes) -> list[tuple[float, str]]:
    """(arrival, data) of each server-sent event in a chunked body."""
    text, at = bytearray(), 0
    ends: list[tuple[int, int]] = []  # of each HTTP chunk: the length of `text` after it, where it ended on the wire
    while True:
        line_end = body.index(b"\r\n", at)
        size = int(body[at:line_end].partition(b";")[0], 16)
        if size == 0:
            break
        text += body[line_end + 2 : line_end + 2 + size]
        at = line_end + 2 + size + 2
        ends.append((len(text), head_length + at))
    events, chunk, read = [], 0, 0
    for event in EVENT.finditer(text):
        while ends[chunk][0] < event.end():
            chunk += 1
        while exchange.reads[read][1] < ends[chunk][1]:
            read += 1
        events.append((exchange.reads[read][0], event[1].decode()))
    return events
