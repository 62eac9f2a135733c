"""configs/smollm2.yaml, and more streams than its KV cache can hold: everything slows, nothing fails."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from benchmarks.soak.stacks import serve_config
from tests.e2e.conftest import BYTES, KV_VALUES_PER_TOKEN, metric, model_id
from tests.stack import ROOT, Stack

STREAMS, OUTPUT_TOKENS, KV_TOKENS = 64, 128, 2000


@pytest.fixture
def base_url(tmp_path: Path) -> Iterator[str]:
    """The YAML as it is, with room for few tokens."""
    config = serve_config(ROOT / "configs/smollm2.yaml")
    engine = config["applications"][0]["args"]["models"][0]["engine"]
    room = KV_TOKENS * KV_VALUES_PER_TOKEN * BYTES[engine["dtype"]]
    engine |= {"max_model_len": 1024, "kv_cache_memory": room}
    stack = Stack(tmp_path, config)
    stack.start()
    yield stack.url
    stack.stop()


async def _lines(response: httpx.Response) -> AsyncIterator[str]:
    """Lines end with a newline only; httpx's own `aiter_lines` also ends them at U+2028 and its like in the text."""
    rest = b""
    async for piece in response.aiter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line.decode()


async def _stream(client: httpx.AsyncClient, model: str, number: int) -> tuple[int, int, str]:
    """Tokens counted one by one, tokens by the server's own count, and why it ended."""
    request = {
        "model": model,
        "prompt": f"Story number {number}. Once upon a time",
        "max_tokens": OUTPUT_TOKENS,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        "seed": number,
    }
    counted, usage, reason, ended = 0, 0, "", False
    async with client.stream("POST", "/v1/completions", json=request) as response:
        assert response.status_code == 200, await response.aread()
        async for line in _lines(response):
            if line == "data: [DONE]":
                ended = True
            elif line.startswith("data: "):
                event = json.loads(line[6:])
                for choice in event["choices"]:
                    counted += len(choice.get("token_ids") or [])
                    reason = choice["finish_reason"] or reason
                usage = (event.get("usage") or {}).get("completion_tokens", usage)
    assert ended
    return counted, usage, reason


@pytest.mark.timeout(600)
async def test_every_stream_finishes_with_all_its_tokens(base_url: str) -> None:
    limits = httpx.Limits(max_connections=STREAMS)
    async with httpx.AsyncClient(base_url=base_url, timeout=500, limits=limits) as client:
        model = await model_id(client)
        results = await asyncio.gather(*(_stream(client, model, number) for number in range(STREAMS)))
    assert results == [(OUTPUT_TOKENS, OUTPUT_TOKENS, "length")] * STREAMS
    assert metric(base_url, "vllm:num_preemptions_total") > 0
    assert metric(base_url, "vllm:num_requests_running") == 0
