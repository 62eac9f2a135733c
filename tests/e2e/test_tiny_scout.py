"""configs/tiny-scout.yaml over HTTP: it reads and adds digits it has never seen, and is lost without its experts."""

import asyncio
import base64
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from tiny_scout import digits
from tiny_scout.answering import MAX_TOKENS, load
from tiny_scout.checkpoint import save
from tiny_scout.dialogues import Dialogue
from tiny_scout.experts import freeze_router, shuffle_experts
from tiny_scout.held_out import Exam, singles, sums

from model import LLM
from tests.stack import ROOT, Stack, free_port

CHECKPOINT = ROOT / "examples/tiny-scout/checkpoint"
CONCURRENCY = 16
SAMPLE = digits.HELD_OUT[:120]
ABLATIONS: dict[str, Callable[[LLM], None]] = {
    "experts-shuffled": shuffle_experts,
    "router-frozen-at-0": lambda model: freeze_router(model, 0),
    "router-frozen-at-5": lambda model: freeze_router(model, 5),
}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The configuration as it is and, beside its model, checkpoints of that with its experts taken away."""
    config = yaml.safe_load((ROOT / "configs/tiny-scout.yaml").read_text())
    config["http_options"]["port"] = free_port()
    application = config["applications"][0]
    one_process = {"engine": {"dtype": "bfloat16", "kv_cache_memory": "64MiB", "num_threads": 1}, "experts": None}
    whole = application["args"]["models"][0]
    for name, ablate in ABLATIONS.items():
        folder = tmp_path_factory.mktemp(name)
        save_ablated(ablate, folder)
        application["args"]["models"].append(whole | one_process | {"id": name, "path": str(folder)})
        application["deployments"].append({"name": f"engine-{name}", "ray_actor_options": {"num_cpus": 0.05}})
    stack = Stack(tmp_path_factory.mktemp("tiny-scout"), config)
    stack.start()
    yield stack.url
    stack.stop()


def save_ablated(ablate: Callable[[LLM], None], folder: Path) -> None:
    """A checkpoint like the original's, but for what `ablate` does to the weights."""
    shutil.copytree(CHECKPOINT, folder, dirs_exist_ok=True)
    model, chat = load(CHECKPOINT)
    ablate(model)
    save(model, folder, chat.image_tokens.patch)


def with_images(dialogue: Dialogue, indices: list[int]) -> Iterator[dict[str, Any]]:
    """The dialogue's messages as the API takes them, without the last answer, digits as PNG files."""
    left = iter(indices)
    for message in dialogue.messages(with_answers=False):
        if not isinstance(message["content"], str):
            for part in message["content"]:
                if part["type"] == "image":
                    image = base64.b64encode(digits.png(next(left))).decode()
                    part |= {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}}
        yield message


async def accuracy(url: str, exam: Exam, model: str = "tiny-scout") -> float:
    """The share of dialogues that the server answers word for word. Ablated models may not find an end."""
    turn = asyncio.Semaphore(CONCURRENCY)

    async def is_right(client: httpx.AsyncClient, dialogue: Dialogue, indices: list[int]) -> bool:
        messages = list(with_images(dialogue, indices))
        body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS}
        async with turn:
            response = await client.post("/v1/chat/completions", json=body)
        choice = response.raise_for_status().json()["choices"][0]
        is_whole = choice["finish_reason"] == "stop"
        assert is_whole or model in ABLATIONS
        return is_whole and choice["message"]["content"] == dialogue.turns[-1].answer

    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        right = await asyncio.gather(*(is_right(client, *question) for question in exam))
    share = sum(right) / len(right)
    print(f"{model}: {share:.1%} of {len(right)} answered word for word")
    return share


def test_it_has_two_ranks_and_four_expert_servers(url: str) -> None:
    cluster = httpx.get(f"{url}/cluster", timeout=30).json()
    assert max(len(engine["ranks"]) for engine in cluster["engines"]) == 2  # the ablated ones have one
    assert len(cluster["experts"]) == 4


async def test_it_reads_digits(url: str) -> None:
    assert await accuracy(url, singles(digits.HELD_OUT)) >= 0.97


async def test_it_adds_two_digits(url: str) -> None:
    assert await accuracy(url, sums(digits.HELD_OUT)) >= 0.90


@pytest.mark.parametrize("model", ABLATIONS)
async def test_without_its_experts_it_is_lost(url: str, model: str) -> None:
    """Tokens meet experts still, only wrong ones; attention and shared experts are intact. tests/examples has all 15
    ways to be wrong.
    """
    assert await accuracy(url, singles(SAMPLE), model) < 0.45
    assert await accuracy(url, sums(SAMPLE), model) < 0.40
