"""What is measured in each round, and the figures of one measurement."""

import asyncio
from dataclasses import asdict, dataclass

import numpy as np

from benchmarks.client import Load, completion, run_load
from benchmarks.prompts import PromptSource


@dataclass(frozen=True)
class Cell:
    """One load: `num_requests` prompts, `concurrency` of them at a time. Lengths are in tokens."""

    name: str
    concurrency: int
    num_requests: int
    prompt_tokens: int
    output_tokens: int

    def payloads(self, model: str, prompts: list[str]) -> list[dict[str, object]]:
        return [completion(model, prompt, self.output_tokens) for prompt in prompts]


CELLS = (
    Cell("1", concurrency=1, num_requests=4, prompt_tokens=100, output_tokens=128),
    Cell("8", concurrency=8, num_requests=24, prompt_tokens=100, output_tokens=128),
    Cell("32", concurrency=32, num_requests=64, prompt_tokens=100, output_tokens=112),
    Cell("prompts", concurrency=8, num_requests=8, prompt_tokens=800, output_tokens=16),
)
WARM_UP = (
    Cell("warm-up 1", concurrency=1, num_requests=1, prompt_tokens=100, output_tokens=16),
    Cell("warm-up 32", concurrency=32, num_requests=32, prompt_tokens=100, output_tokens=16),
)


@dataclass(frozen=True)
class Figures:
    """Throughput in tokens/s; latencies in milliseconds; CPU in seconds of one core per second of load."""

    output_throughput: float
    prompt_throughput: float
    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float
    seconds: float
    client_cpu: float
    server_cpu: float
    idle_peer_cpu: float
    other_cpu: float
    """All that neither server nor the client used: a disturbed measurement shows here."""

    def as_dict(self) -> dict[str, float]:
        return {name: round(value, 4) for name, value in asdict(self).items()}


def measure(cell: Cell, base_url: str, model: str, prompts: list[str]) -> Load:
    """Runs one cell. Raises `BadResponse` when any stream is not complete."""
    return asyncio.run(run_load(base_url, cell.payloads(model, prompts), cell.concurrency))


def take_prompts(cell: Cell, source: PromptSource) -> list[str]:
    return source.take(cell.num_requests, cell.prompt_tokens)


def figures(
    load: Load, *, server_cpu_seconds: float, idle_peer_cpu_seconds: float, machine_cpu_seconds: float
) -> Figures:
    first = np.array([stream.time_to_first_token for stream in load.streams]) * 1e3
    between = np.array([gap for stream in load.streams for gap in stream.inter_token_latencies]) * 1e3
    other = machine_cpu_seconds - server_cpu_seconds - idle_peer_cpu_seconds - load.client_cpu_seconds
    return Figures(
        output_throughput=sum(stream.num_output_tokens for stream in load.streams) / load.seconds,
        prompt_throughput=sum(stream.num_prompt_tokens for stream in load.streams) / load.seconds,
        ttft_p50=float(np.percentile(first, 50)),
        ttft_p99=float(np.percentile(first, 99)),
        itl_p50=float(np.percentile(between, 50)),
        itl_p99=float(np.percentile(between, 99)),
        seconds=load.seconds,
        client_cpu=load.client_cpu_seconds / load.seconds,
        server_cpu=server_cpu_seconds / load.seconds,
        idle_peer_cpu=idle_peer_cpu_seconds / load.seconds,
        other_cpu=other / load.seconds,
    )
