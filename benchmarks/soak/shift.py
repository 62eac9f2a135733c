"""Traffic shifts from prose to numbers: how soon expert servers are even again, and what the move costs requests.

Experts move in the first half minute after the shift; later nothing moves. What requests wait for longer in the first
than in the second is the move's doing.

    make soak-shift
"""

import asyncio
import json
import random
import re
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.soak.load import Answers, load, prompts_of
from benchmarks.soak.stacks import MODEL, on_this_host
from benchmarks.soak.target import Target
from cluster.experts.placement import imbalance, share

STREAMS = 8
BEFORE_SECONDS, MOVING_SECONDS, CALM_SECONDS = 30.0, 30.0, 30.0
WINDOW_SECONDS = 10.0
"""Over which rows are counted: the last before the half minute is over."""
_ROWS = re.compile(r'moray:expert_tokens_total\{expert="(\d+)",layer="(\d+)".*?server="([^"]+)"\} (\S+)')

Rows = Counter[tuple[int, int, str]]
"""By layer, expert and server."""


def numbers(count: int) -> list[str]:
    """Prompts of digits."""
    draw = random.Random(0)
    return [" ".join(str(draw.randrange(10_000)) for _ in range(20)) for _ in range(count)]


def rows_of(target: Target) -> Rows:
    """What the servers have computed so far."""
    rows: Rows = Counter()
    for line in target.lines():
        if found := _ROWS.match(line):
            rows[int(found[2]), int(found[1]), found[3]] += int(float(found[4]))
    return rows


def by_layer(before: Rows, after: Rows) -> list[NDArray[np.float64]]:
    """Of each layer: [experts, servers]."""
    layers, experts, servers = (sorted({key[part] for key in after}) for part in range(3))
    return [
        np.array([[after[layer, e, s] - before[layer, e, s] for s in servers] for e in experts], np.float64)
        for layer in layers
    ]


async def window(target: Target, end: float, seconds: float) -> list[NDArray[np.float64]]:
    """Rows over the `seconds` before `end`, of each layer."""
    await asyncio.sleep(max(0.0, end - seconds - time.perf_counter()))
    before = await asyncio.to_thread(rows_of, target)
    await asyncio.sleep(max(0.0, end - time.perf_counter()))
    return by_layer(before, await asyncio.to_thread(rows_of, target))


async def shift(target: Target) -> dict[str, Any]:
    """The report."""
    prose = prompts_of(target.model, 200)
    await load(target.url, target.model, prose, STREAMS, 0, BEFORE_SECONDS)
    begun, epochs = time.perf_counter(), target.metrics("moray:expert_table_epoch")
    loading = asyncio.create_task(
        load(target.url, target.model, numbers(400), STREAMS, 0, MOVING_SECONDS + CALM_SECONDS)
    )
    at_once = await window(target, begun + 5, 5)
    after = await window(target, begun + MOVING_SECONDS, WINDOW_SECONDS)
    moved = target.metrics("moray:expert_table_epoch")
    answers = await loading
    return {
        "requests": answers.num_answers,
        "lost": len(answers.lost),
        "tables": int(max(moved) - max(epochs)),
        "imbalance_at_once": summary(at_once),
        "imbalance_after_30_s": summary(after),
        "gaps_moving_ms": gaps(answers, begun, MOVING_SECONDS),
        "gaps_calm_ms": gaps(answers, begun + MOVING_SECONDS, CALM_SECONDS),
    }


def summary(layers: list[NDArray[np.float64]]) -> dict[str, Any]:
    """Busiest server over the mean: as it was, and at best on the servers that had rows of the experts."""
    was = [imbalance(rows.sum(0)) for rows in layers]
    best = [imbalance(share(rows.sum(1), rows > 0).sum(0)) for rows in layers]
    worst = max(range(len(was)), key=was.__getitem__)
    return {
        "median_layer": round(statistics.median(was), 3),
        "worst_layer": round(was[worst], 3),
        "at_best": round(best[worst], 3),
        "rows": layers[worst].astype(int).tolist(),
    }


def gaps(answers: Answers, begin: float, seconds: float) -> dict[str, int]:
    """Between tokens, of those that ended in so many seconds from `begin`."""
    some = Answers(gaps=[(end, gap) for end, gap in answers.gaps if begin <= end < begin + seconds])
    found = {"p50": some.percentile(0.5), "p99": some.percentile(0.99), "longest": some.longest()}
    return {name: round(1000 * gap) for name, gap in found.items()}


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="shift-") as folder, on_this_host(Path(folder)) as stack:
        print(json.dumps(asyncio.run(shift(Target(stack.url, MODEL))), indent=1))


if __name__ == "__main__":
    main()
