"""Expert servers behind HTTP: they are killed, freeze, change in number; no client sees more than a pause."""

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from benchmarks.soak.disturbances import KILL, STOP, Disturbances
from benchmarks.soak.load import load, prompts_of
from benchmarks.soak.run import soak
from benchmarks.soak.stacks import MODEL, ONE_HOST, serve_config
from benchmarks.soak.target import Target
from tests.e2e.streams import together
from tests.stack import ROOT, Stack, needs_moe

pytestmark = needs_moe


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("experts"), serve_config())
    stack.start()
    yield stack
    stack.stop()


def test_all_is_shown_and_was_probed(stack: Stack) -> None:
    assert httpx.get(f"{stack.url}/health", timeout=30).status_code == 200
    shown = cluster(stack)
    (directory,) = shown["directories"]
    assert directory["fewest_copies"] == min(count for _, _, count in directory["copies"]) == 2
    assert {(layer, expert) for layer, expert, _ in directory["copies"]} == set(itertools.product(range(30), range(8)))
    assert {member["id"]: member["holds"] for member in directory["servers"]} == {
        server["replica_id"]: len(server["experts"]) for server in shown["experts"]
    }
    assert shown["engines"][0]["expert_epoch"] == directory["epoch"]
    assert not shown["starting"]
    log = stack.log.read_text()
    assert "/rank 2: waiting for experts: " in log


@pytest.mark.timeout(280)
async def test_a_death_and_a_freeze_cost_nothing(stack: Stack) -> None:
    disturbances = Disturbances([KILL, STOP], number=2, every=15.0)
    report = await soak(Target(stack.url, MODEL), disturbances, calm_seconds=10, num_prompts=16)
    print(report)
    assert report["requests"] > 10
    assert report["compared"] > 8
    assert report["lost"] == report["changed"] == report["several_answers"] == 0
    assert report["failovers"] >= 1
    assert max(report["restored_s"]) < 15
    assert report["longest_ms"] < report["calm_p99_ms"] + 1000  # 300 on a quiet machine: `make soak-experts`


def streams_of(count: int, max_tokens: int) -> list[dict[str, Any]]:
    common = {"model": MODEL, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    return [common | {"prompt": f"Story number {number}. Once upon a time an eel"} for number in range(count)]


def cluster(stack: Stack) -> dict[str, Any]:
    return dict(httpx.get(f"{stack.url}/cluster", timeout=30).raise_for_status().json())


@pytest.mark.timeout(280)
async def test_both_copies_of_an_expert_die_and_streams_go_on(stack: Stack) -> None:
    """They pause until the directory has had the expert loaded elsewhere."""
    target, requests = Target(stack.url, MODEL), streams_of(8, 160)
    await asyncio.to_thread(wait_for_servers, target, 4)
    before = await together(stack.url, requests)
    servers = (await asyncio.to_thread(cluster, stack))["experts"]
    holds = {server["pid"]: {tuple(unit) for unit in server["experts"]} for server in servers}
    both = max(itertools.combinations(holds, 2), key=lambda pair: len(holds[pair[0]] & holds[pair[1]]))
    others = set().union(*(units for pid, units in holds.items() if pid not in both))
    gone = (holds[both[0]] & holds[both[1]]) - others
    assert gone, "no expert is on these two servers only"
    waits = sum(target.metrics("moray:expert_waits_total"))

    async def kill_both() -> None:
        await asyncio.sleep(1.5)
        for pid in both:
            os.kill(pid, signal.SIGKILL)

    after = await together(stack.url, requests, kill_both)
    longest, usual = (max(record.longest_gap for record in some) for some in (after, before))
    print(f"{len(gone)} experts without a copy: a pause of {longest:.1f} s, {usual:.2f} s undisturbed")
    assert sum(target.metrics("moray:expert_waits_total")) > waits
    assert longest > 1.0
    assert [record.content for record in after] == [record.content for record in before]
    await asyncio.to_thread(wait_for_servers, target, 4)


@pytest.mark.timeout(280)
async def test_the_directory_dies_and_the_next_one_knows_all(stack: Stack) -> None:
    """Streams go on while there is none; the one that Serve starts places a dead server's experts anew."""
    target, requests = Target(stack.url, MODEL), streams_of(8, 160)
    await asyncio.to_thread(wait_for_servers, target, 4)
    before = await together(stack.url, requests)
    (directory,), epoch = directories(stack), max(target.metrics("moray:expert_table_epoch"))

    async def kill_it() -> None:
        await asyncio.sleep(1.5)
        directory.kill()

    after = await together(stack.url, requests, kill_it)
    longest, usual = (max(record.longest_gap for record in some) for some in (after, before))
    print(f"without a directory: a pause of {longest:.2f} s, {usual:.2f} s undisturbed")
    assert [record.content for record in after] == [record.content for record in before]
    await asyncio.to_thread(wait_for_servers, target, 4)
    assert directory not in directories(stack)
    assert min(target.metrics("moray:expert_table_epoch")) > epoch  # all ranks have a table of the next one

    victim = target.servers()[0]

    async def kill_server() -> None:
        await asyncio.sleep(1.5)
        os.kill(victim.pid, signal.SIGKILL)

    after = await together(stack.url, requests, kill_server)
    assert [record.content for record in after] == [record.content for record in before]
    await asyncio.to_thread(wait_for_servers, target, 4)
    assert target.copies_without(victim.id) == 2
    assert len(directories(stack)) == 1


def directories(stack: Stack) -> list[psutil.Process]:
    return stack.processes(f"ray::ServeReplica:moray:directory-{MODEL}")


@pytest.mark.timeout(280)
async def test_without_any_server_requests_fail_in_time_and_the_ranks_live_on(tmp_path: Path) -> None:
    config = serve_config()
    config["applications"][0]["args"]["models"][0]["experts"]["give_up_s"] = 2.0
    stack, requests = Stack(tmp_path, config), streams_of(4, 160)
    stack.start()
    try:
        before = await together(stack.url, requests)
        engines = (await asyncio.to_thread(cluster, stack))["engines"]
        assert len(engines[0]["ranks"]) == 3
        target = Target(stack.url, MODEL)
        servers = [psutil.Process(server.pid) for server in target.servers()]
        generated = sum(target.metrics("vllm:generation_tokens_total"))

        async def freeze() -> None:  # once all streams have begun: before, the answer would be 503
            while sum(await asyncio.to_thread(target.metrics, "vllm:generation_tokens_total")) < generated + 40:
                await asyncio.sleep(0.1)
            for server in servers:
                server.suspend()
            told.append(await asyncio.to_thread(httpx.get, f"{stack.url}/health", timeout=30))

        told: list[httpx.Response] = []
        begun = time.monotonic()
        failed = await together(stack.url, requests, freeze)
        took = time.monotonic() - begun
        print(f"failed after {took:.1f} s: {failed[0].error}")
        for server in servers:
            with contextlib.suppress(psutil.NoSuchProcess):  # Serve may have replaced it by now
                server.resume()
        assert took < 15
        assert all(record.error and "experts" in record.error["message"] for record in failed)
        assert told[0].status_code == 503
        await asyncio.to_thread(wait_for_servers, target, 4)
        assert httpx.get(f"{stack.url}/health", timeout=30).status_code == 200
        assert [record.content for record in await together(stack.url, requests)] == [r.content for r in before]
        assert (await asyncio.to_thread(cluster, stack))["engines"][0]["ranks"] == engines[0]["ranks"]
    finally:
        stack.stop()


@pytest.mark.timeout(600)
async def test_their_number_changes_under_load(stack: Stack, tmp_path: Path) -> None:
    """2 -> 6 -> 3 by `serve deploy`."""
    target = Target(stack.url, MODEL)
    prompts = prompts_of(target.model, 16)
    calm = await load(target.url, MODEL, prompts, 8, 0, 8)
    loading = asyncio.create_task(load(target.url, MODEL, prompts, 8, 2, 90))
    for count in (2, 6, 3):
        await asyncio.to_thread(deploy, stack, tmp_path / "changed.yaml", count)
        await asyncio.to_thread(wait_for_servers, target, count)
    rough = await loading
    assert not rough.lost
    assert rough.num_answers > 10
    assert all(rough.tokens[prompt] == calm.tokens[prompt] for prompt in rough.tokens if prompt in calm.tokens)
    assert not any(len(answers) > 1 for answers in rough.tokens.values())


def deploy(stack: Stack, path: Path, num_servers: int) -> None:
    line = next(line for line in stack.log.read_text().splitlines() if "serve deploy" in line)
    config = yaml.safe_load(stack.config.read_text())
    for deployment in config["applications"][0]["deployments"]:
        if deployment["name"].startswith("experts-"):
            deployment["num_replicas"] = num_servers
    path.write_text(yaml.safe_dump(config))
    dashboard = line.split(" -a ")[1].split()[0]
    for _ in range(300):  # it comes up after the application
        with contextlib.suppress(httpx.TransportError):
            httpx.get(dashboard)
            break
        time.sleep(0.1)
    command = [str(Path(sys.executable).with_name("serve")), "deploy", "-a", dashboard, str(path)]
    environment = stack.environment | {"RAY_AUTH_MODE": "token"}
    subprocess.run(command, check=True, env=environment, capture_output=True, cwd=ROOT)


def wait_for_servers(target: Target, count: int, copies: int = 2) -> None:
    deadline = time.monotonic() + 150  # four new processes import torch beside the load
    while target.num_servers() != count or target.fewest_copies() < copies:
        assert time.monotonic() < deadline, f"not {count} servers with {copies} copies of everything"
        time.sleep(1)


def test_the_example_is_what_is_tested() -> None:
    application = yaml.safe_load(ONE_HOST.read_text())["applications"][0]
    (model,) = application["args"]["models"]
    assert application["deployments"][-1]["num_replicas"] == 4
    assert (model["engine"]["tensor_parallel_size"], model["experts"]["copies"]) == (3, 2)
