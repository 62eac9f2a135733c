"""Decode steps with local and with remote experts, alternated in one process on the same weights.

make bench-experts
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import deployments  # noqa: F401 (sets what workers inherit)
from cluster.experts.client import ExpertClient
from cluster.shard import Shard
from model.datatypes import PagedBatch
from tests.cluster.experts.processes import HOST, Cluster, ManagedDirectory

BLOCK = 16


def shard(path: Path, threads: int, context: int, sequences: int, experts: object = None) -> Shard:
    return Shard(
        path=str(path), dtype="bfloat16", block_size=BLOCK, max_num_seqs=sequences, max_model_len=2 * context,
        num_threads=threads, experts=experts,
    )  # fmt: skip


class Decoding:
    """`sequences` sequences of one shard that have `context` tokens and get one more with each step."""

    def __init__(self, shard: Shard, sequences: int, context: int) -> None:
        self._shard, self._sequences, self._length = shard, sequences, context
        blocks = -(-2 * context // BLOCK)
        self._tables = torch.arange(sequences * blocks, dtype=torch.int32).view(1, sequences, blocks)
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(0, shard.args.vocab_size, (sequences, context), generator=generator)
        self.tokens = torch.stack([self._prefill(row, prompt) for row, prompt in enumerate(prompts)])

    def _prefill(self, row: int, prompt: torch.Tensor) -> torch.Tensor:
        length = len(prompt)
        batch = PagedBatch(
            prompt, torch.arange(length), torch.tensor([0, length], dtype=torch.int32),
            torch.tensor([length], dtype=torch.int32), self._tables[:, row : row + 1],
            torch.tensor([length - 1]), 0,
        )  # fmt: skip
        return self._shard.logits(batch)[0].argmax()

    def step(self) -> None:
        n = self._sequences
        positions = torch.full((n,), self._length)
        batch = PagedBatch(
            self.tokens, positions, torch.arange(n + 1, dtype=torch.int32), (positions + 1).int(), self._tables,
            torch.arange(n), n,
        )  # fmt: skip
        self.tokens = self._shard.logits(batch).argmax(-1)
        self._length += 1

    def run(self, steps: int) -> float:
        """Seconds a step."""
        begun = time.perf_counter()
        for _ in range(steps):
            self.step()
        return (time.perf_counter() - begun) / steps


class Worker:
    """A process that decodes with the environment of an engine's."""

    def __init__(self, options: argparse.Namespace, socket: str | None) -> None:
        arguments = [f"--{name}={getattr(options, name)}" for name in ("model", "concurrency", "context", "threads")]
        command = [
            sys.executable,
            "-m",
            "benchmarks.experts",
            *arguments,
            *([f"--directory={socket}"] if socket else []),
        ]
        self._process = subprocess.Popen(
            command,
            env=os.environ | {"BENCH_WORKER": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, steps: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit("a worker has ended")
        return dict(json.loads(answer))

    def stop(self) -> None:
        self._process.kill()
        self._process.wait(10)


def work(options: argparse.Namespace) -> None:
    """Runs as many steps as each line of standard input says; answers with seconds a step and the last tokens."""
    client = None
    if options.directory:
        client = ExpertClient(ManagedDirectory(options.directory), HOST)
        client.start()
        client.wait_until_ready(120)
    made = shard(
        options.model, options.threads, options.context, options.concurrency, client and (lambda: client.layer)
    )
    decoding = Decoding(made, options.concurrency, options.context)
    for line in sys.stdin:
        seconds = decoding.run(int(line))
        failovers = client.counts.failovers.total() if client else 0
        print(json.dumps({"seconds": seconds, "tokens": decoding.tokens.tolist(), "failovers": failovers}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-moe"))
    parser.add_argument("--servers", type=int, default=4)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if os.environ.get("BENCH_WORKER"):
        work(options)
    else:
        print(json.dumps(compare(options)))


def compare(options: argparse.Namespace) -> dict[str, Any]:
    times: dict[str, list[float]] = {"local": [], "remote": []}
    last: dict[str, dict[str, Any]] = {}
    workers: dict[str, Worker] = {}
    with tempfile.TemporaryDirectory(prefix="bench-experts-") as folder:
        servers = Cluster(Path(folder), options.model.resolve())
        try:
            servers.start(options.servers)
            workers["remote"] = Worker(options, servers.socket)
            workers["remote"].run(1)
            workers["local"] = Worker(options, None)
            for number in range(options.rounds + 1):
                for name in times:
                    last[name] = workers[name].run(options.steps - (name == "remote" and number == 0))
                    if number:  # the first round warms up
                        times[name].append(last[name]["seconds"])
        finally:
            for worker in workers.values():
                worker.stop()
            servers.stop()
    medians = {name: statistics.median(of) for name, of in times.items()}
    return {
        "ratio": round(medians["local"] / medians["remote"], 3),
        "local_ms": round(1000 * medians["local"], 2),
        "remote_ms": round(1000 * medians["remote"], 2),
        "rounds": [round(a / b, 3) for a, b in zip(times["local"], times["remote"], strict=True)],
        "tokens_equal": last["local"]["tokens"] == last["remote"]["tokens"],
        "failovers": last["remote"]["failovers"],
        "servers": options.servers,
        "concurrency": options.concurrency,
        "threads": options.threads,
        "cpus": os.cpu_count(),
    }


if __name__ == "__main__":
    main()
