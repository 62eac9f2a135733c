"""Kills expert servers under load, and counts what clients notice.

Serves configs/smollm2-moe.yaml, measures what the machine can do, and sends 70% of that: first undisturbed, then with
one server killed (or frozen) every so often. Every answer must be complete and token for token what it was before.

    make soak-experts
"""

import argparse
import asyncio
import json
import os
import re
import signal
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import yaml

from benchmarks.client import BadResponse, _Connection, _events, completion, parse, request_bytes
from benchmarks.prompts import PromptSource
from cluster import processes
from tests.stack import ROOT, Stack, free_port

CONFIG = ROOT / "configs" / "smollm2-moe.yaml"
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


class Target:
    """A running stack whose expert servers can be found."""

    def __init__(self, stack: Stack, model: str) -> None:
        self.url, self.model = stack.url, model
        self._directory = Path(json.loads(Path(stack.environment["MORAY_STATE"]).read_text())["directory"])

    def servers(self) -> list[psutil.Process]:
        found = []
        for process in processes.of_run(self._directory):
            try:
                if any(f"experts-{self.model}" in part for part in process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return sorted(found, key=lambda process: process.pid)

    def metrics(self, pattern: str) -> list[float]:
        """Values of the series whose line matches `pattern`."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=20) as response:
            lines = response.read().decode().splitlines()
        return [float(line.rsplit(" ", 1)[1]) for line in lines if re.match(pattern, line)]

    def fewest_copies(self) -> float:
        """Of any expert; 0 while no directory answers."""
        return min(self.metrics("moray:expert_copies"), default=0)

    def num_servers(self) -> float:
        return next(iter(self.metrics("moray:expert_servers")), 0)


@dataclass
class Disturbance:
    """restored: seconds after each until every expert had two copies again and no dead server was named."""

    times: list[float] = field(default_factory=list)
    restored: list[float] = field(default_factory=list)

    def run(self, target: Target, every: float, number: int, signals: list[int]) -> None:
        for round_ in range(number):
            time.sleep(every / 2 if round_ == 0 else max(0.0, self.times[-1] + every - time.perf_counter()))
            servers = target.servers()
            victim, chosen = servers[round_ % len(servers)], signals[round_ % len(signals)]
            before = target.num_servers()
            os.kill(victim.pid, chosen)
            self.times.append(time.perf_counter())
            self.restored.append(self._wait(target, before))

    def _wait(self, target: Target, before: float) -> float:
        begun = asked = time.perf_counter()
        dropped = False
        while asked - begun < 60:
            # Metrics wait five seconds for a frozen replica, but say how it was when they were asked for.
            asked = time.perf_counter()
            servers, *copies = target.metrics("moray:expert_(servers|copies)")[::-1] or [before]
            dropped = dropped or servers < before
            if dropped and copies and min(copies) >= 2:
                return asked - begun
            time.sleep(1.0)
        return float("inf")


def serve_config(path: Path = CONFIG, **experts: object) -> dict[str, Any]:
    """The YAML's, on a free port. experts: changes of its expert deployment."""
    config = yaml.safe_load(path.read_text())
    config["http_options"]["port"] = free_port()
    for deployment in config["applications"][0]["deployments"]:
        if deployment["name"].startswith("experts-"):
            deployment.update(experts)
    return dict(config)


async def soak(target: Target, disturb: Callable[[], None], seconds: float, calm_seconds: float) -> dict[str, Any]:
    """The report of one run."""
    prompts = prompts_of(target.model, 48)
    await load(target.url, target.model, prompts, 16, 0, 6)
    full = await load(target.url, target.model, prompts, 32, 0, 12)
    rate = 0.7 * full.num_answers / full.seconds
    calm = await load(target.url, target.model, prompts, 64, rate, calm_seconds)
    disturbing = asyncio.create_task(asyncio.to_thread(disturb))
    rough = await load(target.url, target.model, prompts, 64, rate, seconds)
    await disturbing
    changed = [
        prompt for prompt, of in rough.tokens.items() if of != calm.tokens.get(prompt, full.tokens.get(prompt, of))
    ]
    return {
        "requests": rough.num_answers,
        "tokens": rough.num_tokens,
        "lost": len(rough.lost),
        "first_lost": rough.lost[:1],
        "changed": len(changed),
        "several_answers": sum(len(of) > 1 for of in rough.tokens.values()),
        "requests_per_second": round(rate, 2),
        "calm_p99_ms": round(1000 * calm.percentile(0.99)),
        "calm_longest_ms": round(1000 * calm.longest()),
        "longest_ms": round(1000 * rough.longest()),
        "p99_ms": round(1000 * rough.percentile(0.99)),
        "failovers": sum(target.metrics("moray:expert_failovers_total")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=float, default=20, help="seconds between two deaths")
    parser.add_argument("--deaths", type=int, default=9)
    parser.add_argument("--signal", choices=["KILL", "STOP", "both"], default="KILL")
    options = parser.parse_args()
    signals = {"KILL": [signal.SIGKILL], "STOP": [signal.SIGSTOP], "both": [signal.SIGKILL, signal.SIGSTOP]}
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        stack = Stack(Path(folder), serve_config())
        stack.start()
        try:
            target, disturbance = Target(stack, "smollm2-moe"), Disturbance()
            chosen = [int(number) for number in signals[options.signal]]
            report = asyncio.run(
                soak(
                    target,
                    lambda: disturbance.run(target, options.every, options.deaths, chosen),
                    options.every * options.deaths,
                    30,
                )
            )
        finally:
            stack.stop()
    print(json.dumps(report | {"restored_s": [round(seconds, 1) for seconds in disturbance.restored]}))


if __name__ == "__main__":
    main()
