"""Two tensor-parallel ranks of one thread beside one rank of two threads, on the same random Llama.

Both engines are whole but for HTTP and Ray: scheduler, step loop, sampling, mailing, the model in
processes of their own. Rounds alternate, so that a disturbance hits both. Ends in one JSON line.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing as mp
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.report import hardware
from cluster.channel import Address, Inbox
from cluster.parallel import Layout, Rendezvous, World
from cluster.shard_group import ShardGroup, follow
from deployments.config import EngineConfig, ModelConfig
from deployments.engine.deployment import Engine
from deployments.engine.request import EngineRequest, SamplingParams, StepMessage
from model import LLM, ModelArgs

LLAMA = dict(
    dim=768, n_layers=24, n_heads=12, n_kv_heads=4, vocab_size=49152, ffn_hidden_dim=2048, max_seq_len=2048,
    tie_word_embeddings=True,
)  # fmt: skip
FOLDER = Path("models/random-llama-768")
PROMPT_TOKENS, OUTPUT_TOKENS = 100, 112
TIMEOUT_S = 30.0


def save_model(folder: Path) -> None:
    """Writes it once, as Meta would."""
    if (folder / "params.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    args = ModelArgs(**LLAMA)
    torch.save(LLM(args).bfloat16().state_dict(), folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(args.model_dump(mode="json")))


def shard_options(engine: EngineConfig, threads: int) -> dict[str, Any]:
    return dict(
        path=str(FOLDER), dtype=engine.dtype, block_size=engine.block_size, max_num_seqs=engine.max_num_seqs,
        max_model_len=engine.max_model_len, kv_cache_memory=engine.kv_cache_memory, num_threads=threads,
    )  # fmt: skip


def follower(rank: int, layout: Layout, address: str, options: dict[str, Any]) -> None:
    follow(World(layout, rank, address, TIMEOUT_S), options, TIMEOUT_S)


def engine(ranks: int, threads: int, pipe: Connection) -> None:
    """An engine of `ranks` ranks; for every concurrency that comes down the pipe, its tokens per second go up."""
    config = EngineConfig(max_model_len=512, kv_cache_memory=2**29, num_threads=threads)
    group, others = None, []
    if ranks > 1:
        rendezvous, layout = Rendezvous(), Layout(ranks, 1, ("here",) * ranks)
        options = shard_options(config, threads)
        for rank in range(1, ranks):
            arguments = (rank, layout, rendezvous.address, options)
            others.append(mp.get_context("spawn").Process(target=follower, args=arguments))
            others[-1].start()
        group = ShardGroup(World(layout, 0, rendezvous, TIMEOUT_S), TIMEOUT_S, lambda reason: None)
        group.load(options)
    serving = Engine(ModelConfig(id="random", path=str(FOLDER), engine=config), shard=group)
    pipe.send("ready")
    while concurrency := pipe.recv():
        pipe.send(asyncio.run(throughput(serving, concurrency)))
    serving.stop()
    for other in others:
        other.join()


async def throughput(serving: Engine, concurrency: int) -> float:
    """Output tokens per second of 2 * concurrency requests."""
    inbox = Inbox("127.0.0.1")
    listening = asyncio.create_task(count(inbox))
    gate = asyncio.Semaphore(concurrency)
    number = max(4, 2 * concurrency)
    begun = time.perf_counter()
    await asyncio.gather(*(ask(serving, gate, index, inbox.address) for index in range(number)))
    taken = time.perf_counter() - begun
    listening.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await listening
    inbox.close()
    return number * OUTPUT_TOKENS / taken


async def ask(serving: Engine, gate: asyncio.Semaphore, index: int, to: Address) -> None:
    generator = torch.Generator().manual_seed(time.time_ns())  # a prompt that no cache holds
    prompt = torch.randint(0, LLAMA["vocab_size"], (PROMPT_TOKENS,), generator=generator).tolist()
    async with gate:
        params = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0.0)
        await serving.generate(EngineRequest(f"{to.name}-{index}", prompt, params, to))


async def count(inbox: Inbox) -> None:
    while True:
        msgspec.msgpack.decode(await inbox.receive(), type=StepMessage)


def start(ranks: int, threads: int) -> Callable[[int], float]:
    ours, theirs = mp.get_context("spawn").Pipe()
    mp.get_context("spawn").Process(target=engine, args=(ranks, threads, theirs)).start()
    assert ours.recv() == "ready"

    def run(concurrency: int) -> float:
        ours.send(concurrency)
        return float(ours.recv()) if concurrency else 0.0  # 0 ends it

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    options = parser.parse_args()
    save_model(FOLDER)
    engines = {"1 rank x 2 threads": start(1, 2), "2 ranks x 1 thread": start(2, 1)}
    for run in engines.values():
        run(8)
    found: dict[str, dict[int, list[float]]] = {name: {c: [] for c in options.concurrency} for name in engines}
    for _ in range(options.rounds):
        for concurrency in options.concurrency:
            for name, run in engines.items():
                found[name][concurrency].append(run(concurrency))
    for run in engines.values():
        run(0)
    one, two = found.values()
    ratios = {c: median(b / a for a, b in zip(one[c], two[c], strict=True)) for c in options.concurrency}
    table = Table("concurrency", *found, "ratio", title="Output tok/s, median of rounds", title_justify="left")
    for concurrency, ratio in ratios.items():
        medians = (f"{median(rounds[concurrency]):.0f}" for rounds in found.values())
        table.add_row(str(concurrency), *medians, f"{ratio:.2f}")
    Console().print(table)
    print(json.dumps({"benchmark": "tensor_parallel", "ratios": ratios, "rounds": found, **hardware()}))


if __name__ == "__main__":
    main()
