"""Engine replicas are killed, frozen, added and taken away under load: nothing is lost, no token changes."""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import application
from tests.e2e.streams import Record, every_kind, together
from tests.stack import Stack, serve_yaml

MODEL, MAX_TOKENS = "smollm2", 96
REQUESTS = every_kind(MODEL, MAX_TOKENS)


def failover_yaml(num_engines: int) -> dict[str, Any]:
    config = serve_yaml(application(num_threads=1, max_num_batched_tokens=256))
    (engine,) = (entry for entry in config["applications"][0]["deployments"] if entry["name"] == f"engine-{MODEL}")
    engine |= {"num_replicas": num_engines, "ray_actor_options": {"num_cpus": 0.4}}
    return config


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("failover"), failover_yaml(2))
    stack.start()
    yield stack
    stack.stop()


@pytest.fixture(scope="module")
def undisturbed(stack: Stack) -> list[Record]:
    return asyncio.run(together(stack.url, REQUESTS))


def engines(stack: Stack) -> list[dict[str, Any]]:
    return httpx.get(f"{stack.url}/cluster", timeout=30).raise_for_status().json()["engines"]


async def until_engines(stack: Stack, count: int) -> None:
    async with asyncio.timeout(90):
        while len(await asyncio.to_thread(engines, stack)) != count:
            await asyncio.sleep(0.2)


def strike(stack: Stack, kind: signal.Signals, pids: list[int]) -> Callable[[], Awaitable[None]]:
    """Sends a signal to the busiest engine once tokens flow; its pid goes to `pids`."""

    async def act() -> None:
        await asyncio.sleep(2.0)
        victim = max(await asyncio.to_thread(engines, stack), key=lambda engine: engine["running"])
        assert victim["running"] > 0
        os.kill(victim["pid"], kind)
        pids.append(victim["pid"])

    return act


def report(what: str, records: list[Record], before: list[Record]) -> None:
    gap, usual = (max(record.longest_gap for record in some) for some in (records, before))
    changed = sum(record.content != other.content for record, other in zip(records, before, strict=True))
    lost = sum(not record.is_done for record in records)
    print(f"{what}: {len(records)} requests, {lost} lost, {changed} changed; "
          f"longest gap {gap:.2f} s, {usual:.2f} s undisturbed")  # fmt: skip


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_dead_or_frozen_engine_costs_nothing(
    stack: Stack, undisturbed: list[Record], kind: signal.Signals
) -> None:
    await until_engines(stack, 2)
    pids: list[int] = []
    records = await together(stack.url, REQUESTS, strike(stack, kind, pids))
    report(kind.name, records, undisturbed)
    assert [record.content for record in records] == [record.content for record in undisturbed]
    begin = time.monotonic()
    if kind == signal.SIGSTOP:
        os.kill(pids[0], signal.SIGCONT)
    await until_engines(stack, 2)
    print(f"two engines again after {time.monotonic() - begin:.1f} s more")
