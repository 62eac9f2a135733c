"""Requests at a steady rate, and what came of each: its tokens, and the time between any two of them."""

import asyncio
import json
import time
from dataclasses import dataclass, field
from itertools import pairwise
from urllib.parse import urlsplit

from benchmarks.client import BadResponse, _Connection, _events, completion, parse, request_bytes
from benchmarks.prompts import PromptSource
from tests.stack import ROOT

PROMPT_TOKENS, OUTPUT_TOKENS = 60, 64


@dataclass
class Answers:
    """tokens: by prompt, of complete answers. lost: what went wrong with the others. gaps: (end, seconds) of every
    pause between two events of a stream."""

    tokens: dict[str, set[tuple[int, ...]]] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    gaps: list[tuple[float, float]] = field(default_factory=list)
    num_answers: int = 0
    num_tokens: int = 0
    seconds: float = 0.0

    def longest(self) -> float:
        return max((gap for _, gap in self.gaps), default=0.0)

    def percentile(self, share: float) -> float:
        ordered = sorted(gap for _, gap in self.gaps)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0.0


async def load(url: str, model: str, prompts: list[str], concurrency: int, rate: float, seconds: float) -> Answers:
    """`rate` requests a second (0: as many as `concurrency` streams take), for `seconds`, then the rest of them."""
    answers, connections = Answers(), asyncio.Queue[_Connection]()
    place, loop = urlsplit(url), asyncio.get_running_loop()
    for _ in range(concurrency):
        connections.put_nowait((await loop.create_connection(_Connection, place.hostname, place.port))[1])

    async def ask(prompt: str, connection: _Connection) -> None:
        payload = completion(model, prompt, OUTPUT_TOKENS) | {"return_token_ids": True}
        try:
            exchange = await connection.exchange(request_bytes(url, payload), 120)
            stream = parse(exchange, payload)
            head, _, body = bytes(exchange.body).partition(b"\r\n\r\n")
            events = [json.loads(text) for _, text in _events(exchange, len(head) + 4, body)[:-1]]
            choices = [choice for event in events for choice in event["choices"]]
            tokens = tuple(token for choice in choices for token in choice.get("token_ids") or ())
            answers.tokens.setdefault(prompt, set()).add(tokens)
            answers.gaps += [(b, b - a) for a, b in pairwise(stream.token_times)]
            answers.num_answers += 1
            answers.num_tokens += len(tokens)
        except BadResponse as error:
            answers.lost.append(str(error))
            connection = (await loop.create_connection(_Connection, place.hostname, place.port))[1]
        connections.put_nowait(connection)

    begun, tasks, number = time.perf_counter(), set(), 0
    while time.perf_counter() - begun < seconds:
        if rate:
            await asyncio.sleep(max(0.0, begun + number / rate - time.perf_counter()))
        connection = await connections.get()
        task = asyncio.create_task(ask(prompts[number % len(prompts)], connection))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        number += 1
    answers.seconds = time.perf_counter() - begun
    while tasks:
        await asyncio.wait(set(tasks))
    while not connections.empty():
        connections.get_nowait().close()
    return answers


def prompts_of(model: str, count: int) -> list[str]:
    return PromptSource(ROOT / "models" / model / "tokenizer.json").take(count, PROMPT_TOKENS)
