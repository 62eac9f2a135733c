"""The load client: what it counts as a complete answer, and when each token arrived."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import pytest

from benchmarks.client import BadResponse, completion, run_load

PAUSE = 0.05
PAYLOAD = completion("m", "hello", num_output_tokens=3)


def _event(message: object) -> bytes:
    return b"data: " + (message if isinstance(message, bytes) else json.dumps(message).encode()) + b"\n\n"


TOKEN = _event({"choices": [{"text": "data: {\n\n"}]})
USAGE = _event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3}})
DONE = _event(b"[DONE]")
HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def _chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


@contextlib.asynccontextmanager
async def _server(*parts: bytes) -> AsyncIterator[str]:
    """Answers every request with `parts`, `PAUSE` apart."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]))
                for part in parts:
                    writer.write(part)
                    await asyncio.sleep(PAUSE)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


async def test_each_token_has_the_time_it_arrived() -> None:
    split = _chunk(TOKEN + USAGE + DONE) + b"0\r\n\r\n"
    async with _server(HEAD + _chunk(TOKEN), _chunk(TOKEN), split[:9], split[9:]) as url:
        load = await run_load(url, [PAYLOAD] * 3, concurrency=2)
    assert len(load.streams) == 3
    for stream in load.streams:
        assert (stream.num_prompt_tokens, stream.num_output_tokens) == (5, 3)
        first, second = stream.inter_token_latencies
        assert 0.8 * PAUSE < first < 1.9 * PAUSE
        assert second > 1.8 * PAUSE


@pytest.mark.parametrize(
    "parts",
    [
        (b"HTTP/1.1 400 Bad Request\r\nContent-Length: 2\r\n\r\n{}",),
        (HEAD, _chunk(TOKEN + USAGE), b"0\r\n\r\n"),
        (HEAD, _chunk(TOKEN + DONE), b"0\r\n\r\n"),
        (HEAD, _chunk(_event({"error": {"message": "died"}}) + USAGE + DONE), b"0\r\n\r\n"),
    ],
    ids=["status", "no [DONE]", "no usage", "error event"],
)
async def test_an_incomplete_answer_is_an_error(parts: tuple[bytes, ...]) -> None:
    async with _server(*parts) as url:
        with pytest.raises(BadResponse):
            await run_load(url, [PAYLOAD], concurrency=1)
