"""configs/tiny-scout.yaml over HTTP: it reads and adds digits that it has never seen."""

import asyncio
import base64
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from tiny_scout import digits
from tiny_scout.dialogues import Dialogue
from tiny_scout.held_out import Exam, singles, sums

ROOT = Path(__file__).parents[2]
CONCURRENCY = 16


@pytest.fixture(scope="module")
def url(start_stack: Callable[[dict[str, Any]], str]) -> str:
    config = yaml.safe_load((ROOT / "configs/tiny-scout.yaml").read_text())
    return start_stack(config["applications"][0]["args"])


def with_images(dialogue: Dialogue, indices: list[int]) -> Iterator[dict[str, Any]]:
    """The dialogue's messages as the API takes them, without the last answer, digits as PNG files."""
    left = iter(indices)
    for message in dialogue.messages(with_answers=False):
        if not isinstance(message["content"], str):
            for part in message["content"]:
                if part["type"] == "image":
                    image = base64.b64encode(digits.png(next(left))).decode()
                    part |= {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}}
        yield message


async def accuracy(url: str, exam: Exam) -> float:
    """The share of dialogues that the server answers word for word."""
    turn = asyncio.Semaphore(CONCURRENCY)

    async def is_right(client: httpx.AsyncClient, dialogue: Dialogue, indices: list[int]) -> bool:
        body = {"model": "tiny-scout", "messages": list(with_images(dialogue, indices)), "temperature": 0}
        async with turn:
            response = await client.post("/v1/chat/completions", json=body)
        choice = response.raise_for_status().json()["choices"][0]
        assert choice["finish_reason"] == "stop"
        return bool(choice["message"]["content"] == dialogue.turns[-1].answer)

    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        right = await asyncio.gather(*(is_right(client, *question) for question in exam))
    share = sum(right) / len(right)
    print(f"{share:.1%} of {len(right)} answered word for word")
    return share


async def test_it_reads_digits(url: str) -> None:
    assert await accuracy(url, singles(digits.HELD_OUT)) >= 0.97


async def test_it_adds_two_digits(url: str) -> None:
    assert await accuracy(url, sums(digits.HELD_OUT)) >= 0.90
