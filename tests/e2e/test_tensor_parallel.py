"""configs/smollm2-tp3.yaml: three ranks say what one says, and one's death ends and replaces them all."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest
import yaml

from cluster.shard import Shard
from cluster.shared_memory import available
from deployments.engine.readiness import GOOD_FOR_SECONDS
from tests.cluster.test_shard_group import greedy
from tests.e2e.conftest import GGUF
from tests.stack import ROOT, Stack, free_port

pytestmark = pytest.mark.skipif(not available(), reason="needs a C++ compiler")

PROMPTS = [[504, 2365, 282, 4649, 314 + number, *range(100, 100 + 7 * number)] for number in range(8)]
OUTPUTS = 32


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    config: dict[str, Any] = yaml.safe_load((ROOT / "configs/smollm2-tp3.yaml").read_text())
    config["http_options"]["port"] = free_port()
    config["applications"][0]["args"]["models"][0]["engine"] |= {"dtype": "float32", "max_model_len": 2048}
    stack = Stack(tmp_path_factory.mktemp("tp3"), config)
    stack.start()
    yield stack
    if stack.process.poll() is None:
        stack.stop()


async def _complete(client: httpx.AsyncClient, prompt: list[int]) -> list[int]:
    request = {"model": "smollm2", "prompt": prompt, "max_tokens": OUTPUTS, "temperature": 0, "ignore_eos": True}
    response = await client.post("/v1/completions", json=request | {"return_token_ids": True})
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["token_ids"]


async def _together(stack: Stack) -> list[list[int]]:
    async with httpx.AsyncClient(base_url=stack.url, timeout=120) as client:
        return await asyncio.gather(*(_complete(client, prompt) for prompt in PROMPTS))


def ranks_of(stack: Stack) -> list[psutil.Process]:
    """The engine's processes: its followers, and the replica that leads them."""
    return stack.processes("ray::Rank", "ray::ServeReplica:moray:engine-")


async def test_three_ranks_say_what_one_says(stack: Stack) -> None:
    alone = Shard(
        path=str(GGUF), dtype="float32", block_size=16, max_num_seqs=8, max_model_len=2048, kv_cache_memory=2**28
    )
    expected, _ = greedy(alone, PROMPTS, OUTPUTS)
    (engine,) = httpx.get(f"{stack.url}/cluster").json()["engines"]
    assert [rank["rank"] for rank in engine["ranks"]] == [0, 1, 2]
    assert engine["ranks"][0]["pid"] == engine["pid"]
    assert {rank["pid"] for rank in engine["ranks"]} == {each.pid for each in ranks_of(stack)}
    assert await _together(stack) == expected


async def test_a_rank_that_does_not_answer_shows_in_health(stack: Stack) -> None:
    follower = next(each for each in ranks_of(stack) if each.cmdline()[0].startswith("ray::Rank"))
    assert httpx.get(f"{stack.url}/health", timeout=30).status_code == 200
    await asyncio.sleep(GOOD_FOR_SECONDS)
    follower.suspend()
    try:
        frozen = await asyncio.to_thread(httpx.get, f"{stack.url}/health", timeout=30)
    finally:
        follower.resume()
    assert frozen.status_code == 503
    assert frozen.json()["error"]["message"] == "Not every engine is ready: smollm2: no answer in time"
    assert httpx.get(f"{stack.url}/health", timeout=30).status_code == 200


async def test_a_killed_rank_ends_and_replaces_the_group(stack: Stack) -> None:
    before = await _together(stack)
    memory = set(os.listdir("/dev/shm"))
    old = ranks_of(stack)
    victim = next(each for each in old if each.cmdline()[0].startswith("ray::Rank"))
    begun = time.monotonic()
    victim.send_signal(signal.SIGKILL)
    _, alive = await asyncio.to_thread(psutil.wait_procs, old, 2)
    assert not [each for each in alive if each.status() != psutil.STATUS_ZOMBIE]
    gone = time.monotonic() - begun
    starting: set[str] = set()
    async with httpx.AsyncClient(base_url=stack.url, timeout=60) as client:
        asked = asyncio.create_task(_complete(client, PROMPTS[0]))
        while not asked.done():
            shown = (await client.get("/cluster")).json()
            starting |= {process["process"].rpartition("/")[2] for process in shown["starting"]}
            await asyncio.sleep(0.5)
        again = await asked
    assert {"rank 1", "rank 2"} < starting
    print(f"group gone after {gone:.2f} s, serving again after {time.monotonic() - begun:.1f} s")
    assert again == before[0]
    assert await _together(stack) == before
    new = ranks_of(stack)
    assert len(new) == 3
    assert not {each.pid for each in new} & {each.pid for each in old}
    assert not [name for name in set(os.listdir("/dev/shm")) - memory if "moray" in name]
