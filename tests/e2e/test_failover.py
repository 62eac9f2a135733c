"""Engine replicas are killed, frozen, added and taken away under load: nothing is lost, no token changes."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.e2e.conftest import application
from tests.e2e.streams import Record, every_kind, stream, together
from tests.stack import ROOT, Stack, serve_yaml

MODEL, MAX_TOKENS = "smollm2", 96
REQUESTS = every_kind(MODEL, MAX_TOKENS)


def failover_yaml(num_engines: int) -> dict[str, Any]:
    config = serve_yaml(application(num_threads=1, max_num_batched_tokens=256))
    front, engine = config["applications"][0]["deployments"]
    front |= {"num_replicas": 2, "ray_actor_options": {"num_cpus": 0.2}}
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


def strike(stack: Stack, kind: signal.Signals, struck: list[tuple[int, float]]) -> Callable[[], Awaitable[None]]:
    """Sends a signal to the busiest engine once tokens flow; its pid and the time go to `struck`."""

    async def act() -> None:
        await asyncio.sleep(2.0)
        victim = max(await asyncio.to_thread(engines, stack), key=lambda engine: engine["running"])
        assert victim["running"] > 0
        os.kill(victim["pid"], kind)
        struck.append((victim["pid"], time.monotonic()))

    return act


def report(what: str, records: list[Record], before: list[Record], moment: float = 0.0) -> None:
    """One line for people."""
    gap, usual = (max(record.longest_gap for record in some) for some in (records, before))
    pauses = sorted(record.gap_at(moment) for record in records) if moment else [0.0]
    changed = sum(record.differs_from(other) for record, other in zip(records, before, strict=True))
    lost = sum(not record.is_done for record in records)
    print(
        f"{what}: {len(records)} requests, {lost} lost, {changed} changed; longest gap {gap:.2f} s, {usual:.2f} s "
        f"undisturbed; at the strike, median {pauses[len(pauses) // 2]:.2f} s, longest {pauses[-1]:.2f} s"
    )


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_dead_or_frozen_engine_costs_nothing(
    stack: Stack, undisturbed: list[Record], kind: signal.Signals
) -> None:
    """Killed, another goes on at once. Frozen, its silence tells; Serve replaces it, and it never comes back."""
    await until_engines(stack, 2)
    struck: list[tuple[int, float]] = []
    records = await together(stack.url, REQUESTS, strike(stack, kind, struck))
    report(kind.name, records, undisturbed, struck[0][1])
    assert_nothing_changed(records, undisturbed)
    begin = time.monotonic()
    await until_replaced(stack, struck[0][0], 2)
    print(f"two engines again {time.monotonic() - begin:.1f} s later")
    assert httpx.get(f"{stack.url}/health", timeout=30).status_code == 200


async def test_an_engine_that_thaws_is_used_again_and_keeps_nothing(stack: Stack, undisturbed: list[Record]) -> None:
    await until_engines(stack, 2)
    struck: list[tuple[int, float]] = []

    async def freeze_and_thaw() -> None:
        await strike(stack, signal.SIGSTOP, struck)()
        await asyncio.sleep(5.0)
        os.kill(struck[0][0], signal.SIGCONT)

    records = await together(stack.url, REQUESTS, freeze_and_thaw)
    report("SIGSTOP for 5 s", records, undisturbed, struck[0][1])
    assert_nothing_changed(records, undisturbed)
    async with asyncio.timeout(30):
        while any(engine["running"] or engine["waiting"] for engine in await asyncio.to_thread(engines, stack)):
            await asyncio.sleep(0.2)
    assert struck[0][0] in [engine["pid"] for engine in engines(stack)]


async def test_requests_without_a_seed_get_all_their_tokens(stack: Stack) -> None:
    await until_engines(stack, 2)
    request = {"model": MODEL, "prompt": "An eel", "max_tokens": MAX_TOKENS, "ignore_eos": True, "n": 2}
    struck: list[tuple[int, float]] = []
    records = await together(stack.url, [request] * 6, strike(stack, signal.SIGKILL, struck))
    assert all(record.is_done and record.completion_tokens == 2 * MAX_TOKENS for record in records)
    assert all(len(tokens) == MAX_TOKENS for record in records for tokens in record.tokens.values())
    await until_replaced(stack, struck[0][0], 2)


async def test_the_only_engine_dies_and_streams_wait_for_the_next(stack: Stack, undisturbed: list[Record]) -> None:
    await deploy(stack, 1)
    struck: list[tuple[int, float]] = []
    records = await together(stack.url, REQUESTS, strike(stack, signal.SIGKILL, struck))
    report("SIGKILL of the only engine", records, undisturbed, struck[0][1])
    assert_nothing_changed(records, undisturbed)


async def test_a_front_dies_and_what_it_had_not_begun_to_answer_is_asked_again(stack: Stack) -> None:
    """Its streams break, which a client sees; answers in one piece come from the other front."""
    request = {"model": MODEL, "prompt": "An eel", "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True}
    async with httpx.AsyncClient(base_url=stack.url, timeout=120) as client:
        fronts = (await client.get("/cluster")).json()["fronts"]
        assert len(fronts) == 2
        whole = [asyncio.ensure_future(client.post("/v1/completions", json=request)) for _ in range(8)]
        streams = [asyncio.ensure_future(stream(client, request)) for _ in range(8)]
        await asyncio.sleep(1.5)
        os.kill(fronts[0]["pid"], signal.SIGKILL)
        answers, ended = await asyncio.gather(
            asyncio.gather(*whole, return_exceptions=True), asyncio.gather(*streams, return_exceptions=True)
        )
    broken = sum(isinstance(end, httpx.TransportError) for end in ended)
    came = [answer.status_code for answer in answers if isinstance(answer, httpx.Response)]
    print(f"front killed: {broken} of 8 streams broke, {came.count(200)} of 8 answers in one piece came")
    assert came == [200] * 8
    assert {answer.json()["choices"][0]["text"] for answer in answers} == {answers[0].json()["choices"][0]["text"]}
    assert all(isinstance(end, httpx.TransportError) or end.is_done for end in ended)


async def test_engines_drop_what_a_dead_front_had_asked(stack: Stack) -> None:
    """On one cluster Serve tells of it, too; what only silence tells is in test_heartbeat.py."""
    request = {"model": MODEL, "prompt": "An eel", "max_tokens": 1500, "temperature": 0, "ignore_eos": True}
    await until_fronts(stack, 2)
    async with httpx.AsyncClient(base_url=stack.url, timeout=120) as client:
        front = (await client.get("/cluster")).json()["fronts"][0]
        streams = [asyncio.ensure_future(stream(client, request)) for _ in range(8)]
        await asyncio.sleep(2.0)
        assert await running(stack) == 8
        os.kill(front["pid"], signal.SIGKILL)
        begun = time.monotonic()
        while (left := await running(stack)) == 8:
            assert time.monotonic() - begun < 3
        print(f"{8 - left} requests of a dead front dropped after {time.monotonic() - begun:.2f} s")
        for each in streams:
            each.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    await until_fronts(stack, 2)


async def running(stack: Stack) -> int:
    """Sequences in the steps of all engines."""
    return sum(engine["running"] for engine in await asyncio.to_thread(engines, stack))


async def until_fronts(stack: Stack, count: int) -> None:
    async with asyncio.timeout(60), httpx.AsyncClient(base_url=stack.url, timeout=30) as client:
        while len((await client.get("/cluster")).json()["fronts"]) != count:
            await asyncio.sleep(0.2)


@pytest.mark.timeout(600)
async def test_engines_come_and_go_under_load(stack: Stack, undisturbed: list[Record]) -> None:
    await deploy(stack, 1)
    records: list[Record] = []
    before: list[Record] = []
    scaling = asyncio.ensure_future(_scale(stack, 3, 1))

    async def ask_again_and_again(client: httpx.AsyncClient, first: int) -> None:
        for number in count(first):
            if scaling.done():
                return
            records.append(await stream(client, REQUESTS[number % len(REQUESTS)]))
            before.append(undisturbed[number % len(REQUESTS)])

    async with httpx.AsyncClient(base_url=stack.url, timeout=300) as client:
        await asyncio.gather(scaling, *(ask_again_and_again(client, 2 * first) for first in range(6)))
    report("1 -> 3 -> 1", records, before)
    assert_nothing_changed(records, before)


async def _scale(stack: Stack, *numbers: int) -> None:
    for number in numbers:
        await asyncio.sleep(3.0)
        await deploy(stack, number)
    await asyncio.sleep(3.0)


async def deploy(stack: Stack, num_engines: int) -> None:
    """`serve deploy` of the same application with another number of engines; returns when there are so many."""
    line = next(line for line in stack.log.read_text().splitlines() if "serve deploy" in line)
    dashboard = line.split(" -a ")[1].split()[0]
    config = failover_yaml(num_engines)
    config["http_options"] = yaml.safe_load(stack.config.read_text())["http_options"]
    path = stack.config.with_name("changed.yaml")
    path.write_text(yaml.safe_dump(config))
    command = [str(Path(sys.executable).with_name("serve")), "deploy", "-a", dashboard, str(path)]
    environment = stack.environment | {"RAY_AUTH_MODE": "token"}
    process = await asyncio.create_subprocess_exec(*command, env=environment, cwd=ROOT)
    assert await asyncio.wait_for(process.wait(), 60) == 0
    await until_engines(stack, num_engines)


async def until_replaced(stack: Stack, pid: int, count: int) -> None:
    async with asyncio.timeout(120):
        while True:
            pids = [engine["pid"] for engine in await asyncio.to_thread(engines, stack)]
            if len(pids) == count and pid not in pids:
                return
            await asyncio.sleep(0.2)


def assert_nothing_changed(records: list[Record], before: list[Record]) -> None:
    for record, other in zip(records, before, strict=True):
        assert record.content == other.content
        assert not record.differs_from(other)
