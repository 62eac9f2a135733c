"""fp32, greedy: the company a request keeps never changes its tokens.

Alone, in a batch of 32, with its prefix cached, prefilled in chunks, and after preemption, the
same prompts give exactly the same tokens.
"""

import asyncio
from collections.abc import Callable
from pydoc_data import topics

import httpx
import pytest

from tests.e2e.conftest import metric, model_id

PROMPTS = [
    topics.topics[name][:length] for name, length in zip(sorted(topics.topics), [40, 200, 500, 900] * 8, strict=False)
]
OUTPUT_TOKENS = 32
Tokens = list[list[int]]


async def _complete(client: httpx.AsyncClient, model: str, prompt: str, **extra: object) -> list[int]:
    request = {"model": model, "prompt": prompt, "max_tokens": OUTPUT_TOKENS, "temperature": 0, "ignore_eos": True}
    response = await client.post("/v1/completions", json=request | {"return_token_ids": True} | extra)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["token_ids"]


async def _together(base_url: str, prompts: list[str]) -> Tokens:
    async with httpx.AsyncClient(base_url=base_url, timeout=300) as client:
        model = await model_id(client)
        return await asyncio.gather(*(_complete(client, model, prompt) for prompt in prompts))


async def _one_by_one(base_url: str, prompts: list[str]) -> Tokens:
    async with httpx.AsyncClient(base_url=base_url, timeout=300) as client:
        model = await model_id(client)
        return [await _complete(client, model, prompt) for prompt in prompts]


@pytest.mark.timeout(900)
async def test_tokens_do_not_depend_on_company(start_engine: Callable[..., str]) -> None:
    some = PROMPTS[::4] + PROMPTS[3::8]
    plain = start_engine(enable_prefix_caching=False)
    alone = dict(zip(some, await _one_by_one(plain, some), strict=True))
    batched = dict(zip(PROMPTS, await _together(plain, PROMPTS), strict=True))
    assert {prompt: batched[prompt] for prompt in some} == alone

    cached = start_engine(enable_prefix_caching=True)
    assert await _together(cached, PROMPTS) == list(batched.values())
    hits = metric(cached, "vllm:prefix_cache_hits_total")
    assert await _together(cached, PROMPTS) == list(batched.values())
    assert metric(cached, "vllm:prefix_cache_hits_total") > hits

    chunked = start_engine(enable_prefix_caching=False, max_num_batched_tokens=64)
    assert await _together(chunked, PROMPTS) == list(batched.values())

    # 32 sequences need about 130 tokens each: these blocks hold a few of them at a time.
    crowded = start_engine(max_model_len=1024, num_kv_tokens=1040)
    assert await _together(crowded, PROMPTS) == list(batched.values())
    assert metric(crowded, "vllm:num_preemptions_total") > 0
