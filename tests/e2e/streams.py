"""Requests of every kind, as streams whose every token is written down with its time."""

import asyncio
import json
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

Choices = dict[int, list[int]]


@dataclass
class Record:
    """What one request got. times: of its events. error: of its error event."""

    tokens: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    text: dict[int, str] = field(default_factory=lambda: defaultdict(str))
    logprobs: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    reasons: dict[int, str] = field(default_factory=dict)
    completion_tokens: int = 0
    times: list[float] = field(default_factory=list)
    is_done: bool = False
    error: dict[str, Any] | None = None

    @property
    def content(self) -> tuple[Any, ...]:
        """All that must not depend on what dies, to the last token; log probabilities in fp32 only nearly."""
        return dict(self.tokens), dict(self.text), self.reasons, self.completion_tokens, self.is_done, self.error

    def differs_from(self, other: "Record") -> bool:
        if self.content != other.content or self.logprobs.keys() != other.logprobs.keys():
            return True
        return any(self.logprobs[index] != pytest.approx(other.logprobs[index], abs=1e-3) for index in self.logprobs)

    @property
    def longest_gap(self) -> float:
        return max((after - before for before, after in zip(self.times, self.times[1:], strict=False)), default=0.0)

    def gap_at(self, moment: float) -> float:
        """The time without an event around `moment`."""
        around = zip(self.times, self.times[1:], strict=False)
        return next((after - before for before, after in around if before <= moment <= after), 0.0)

    def add(self, event: dict[str, Any]) -> None:
        self.times.append(time.monotonic())
        self.error = event.get("error", self.error)
        for choice in event.get("choices", ()):
            index = choice["index"]
            self.tokens[index] += choice.get("token_ids") or []
            self.text[index] += choice["text"]
            self.logprobs[index] += (choice.get("logprobs") or {}).get("token_logprobs") or []
            if choice["finish_reason"]:
                self.reasons[index] = choice["finish_reason"]
        self.completion_tokens = (event.get("usage") or {}).get("completion_tokens", self.completion_tokens)


async def stream(client: httpx.AsyncClient, request: dict[str, Any]) -> Record:
    """Runs one request to the end of its stream, whatever that is."""
    extra = {"stream": True, "return_token_ids": True, "stream_options": {"include_usage": True}}
    record, rest = Record(), b""
    async with client.stream("POST", "/v1/completions", json=request | extra) as response:
        assert response.status_code == 200, await response.aread()
        async for piece in response.aiter_bytes():
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                if line == b"data: [DONE]":
                    record.is_done = True
                elif line.startswith(b"data: "):
                    record.add(json.loads(line[6:]))
    return record


async def together(
    base_url: str, requests: Sequence[dict[str, Any]], meanwhile: Callable[[], Any] | None = None
) -> list[Record]:
    """All `requests` at once. `meanwhile` is awaited beside them."""
    limits = httpx.Limits(max_connections=len(requests) + 4)
    async with httpx.AsyncClient(base_url=base_url, timeout=300, limits=limits) as client:
        running = [asyncio.ensure_future(stream(client, request)) for request in requests]
        if meanwhile is not None:
            await meanwhile()
        return list(await asyncio.gather(*running))


def every_kind(model: str, max_tokens: int) -> list[dict[str, Any]]:
    """Requests whose answers are the same whenever they are asked."""
    base = {"model": model, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    story = "Once upon a time there was an eel who"
    return [
        *({**base, "prompt": f"Story number {number}. {story}"} for number in range(4)),
        {**base, "prompt": story, "logprobs": 2},
        {**base, "prompt": story, "temperature": 0.9, "seed": 7, "n": 2, "logprobs": 1},
        {**base, "prompt": story, "temperature": 1.2, "seed": 8, "top_p": 0.9, "top_k": 50},
        {**base, "prompt": story, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.3},
        {**base, "prompt": story, "temperature": 0.7, "seed": 9, "stop": ["\n\n\n", "zebra"], "ignore_eos": False,
         "min_tokens": max_tokens // 2},
        {**base, "prompt": [story, "The sea is"], "temperature": 0.5, "seed": 10, "n": 2},
        {**base, "prompt": "word " * 700, "max_tokens": max_tokens // 2},
    ]  # fmt: skip
