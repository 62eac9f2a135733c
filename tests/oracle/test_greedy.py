"""Through HTTP, fp32: 32 prompts x 64 greedy tokens are token for token those of transformers.

Prompts are sent as token ids: transformers' own GGUF tokenizer cuts digits as GPT-2 does, not as SmolLM2 does.
"""

import asyncio

import httpx
import pytest

from tests.oracle.conftest import OUTPUT_TOKENS, Continuation


async def _complete(client: httpx.AsyncClient, model: str, prompt: list[int]) -> dict[str, object]:
    request = {
        "model": model,
        "prompt": prompt,
        "max_tokens": OUTPUT_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    response = await client.post("/v1/completions", json=request)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


@pytest.mark.timeout(600)
async def test_greedy_tokens_are_those_of_transformers(fp32_stack: str, continuations: list[Continuation]) -> None:
    async with httpx.AsyncClient(base_url=fp32_stack, timeout=300) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        answers = await asyncio.gather(*(_complete(client, model, known.prompt_ids) for known in continuations))
    wrong = [
        (known.prompt, known.output_ids, answer["token_ids"])
        for known, answer in zip(continuations, answers, strict=True)
        if answer["token_ids"] != known.output_ids
    ]
    assert not wrong, f"{len(wrong)} of {len(continuations)} differ, first: {wrong[0]}"
    assert [answer["prompt_token_ids"] for answer in answers] == [known.prompt_ids for known in continuations]
