"""Through HTTP, fp32: 32 prompts x 64 greedy tokens are token for token those of transformers.

Prompts are sent as token ids; tokenizers have tests of their own.
"""

import asyncio
from typing import Any

import httpx
import torch

OUTPUT_TOKENS = 64


async def _complete(client: httpx.AsyncClient, model: str, prompt: list[int]) -> dict[str, Any]:
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


@torch.no_grad()
def _said_by(reference: Any, prompt: list[int], output: list[int]) -> list[int]:
    """What the reference says greedily after the prompt and after every part of `output`, in one pass.

    If that is `output`, then so is, token by token, what it would generate; and it takes a tenth of the time.
    """
    logits = reference(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
    return logits.argmax(-1).tolist()


async def test_greedy_tokens_are_those_of_transformers(
    fp32_stack: str, transformers_smollm2: Any, prompts: list[list[int]]
) -> None:
    async with httpx.AsyncClient(base_url=fp32_stack, timeout=300) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        answers = await asyncio.gather(*(_complete(client, model, prompt) for prompt in prompts))
    assert [answer["prompt_token_ids"] for answer in answers] == prompts
    outputs = [answer["token_ids"] for answer in answers]
    assert [len(output) for output in outputs] == [OUTPUT_TOKENS] * len(prompts)
    expected = [_said_by(transformers_smollm2, prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]
    wrong = [row for row in zip(prompts, expected, outputs, strict=True) if row[1] != row[2]]
    assert not wrong, f"{len(wrong)} of {len(prompts)} differ, first: {wrong[0]}"
