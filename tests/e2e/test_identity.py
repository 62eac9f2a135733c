"""Every split of a model says over HTTP what one rank with local experts says: ranks, stages, expert servers.

In float32 token for token. In bfloat16 the sums over ranks round differently: log probabilities of the tokens of a
prompt may differ by `TOLERANCE` on average. Three ranks of smollm2-moe were measured at 0.012, stages and expert
servers at 0.
"""

import asyncio
import base64
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from tiny_scout import digits

from benchmarks.soak.target import Target
from cluster.shared_memory import available
from tests.e2e.conftest import GGUF
from tests.e2e.test_experts import deploy, wait_for_servers
from tests.stack import ROOT, Stack, serve_yaml

pytestmark = [pytest.mark.skipif(not available(), reason="needs a C++ compiler"), pytest.mark.timeout(300)]

PATHS = {
    "smollm2": GGUF,
    "smollm2-moe": ROOT / "models/smollm2-moe",
    "tiny-scout": ROOT / "examples/tiny-scout/checkpoint",
}
OUTPUTS = 24
TOLERANCE = 0.03
PROMPTS = [[504, 2365, 282, 4649, 314 + number, *range(100, 100 + 11 * number)] for number in range(6)]
LONG = "A moray eel lives in a crevice of the reef. It hunts at night, by smell, and has a second pair of jaws. " * 4

Split = tuple[int, int, int | None]
"""Tensor-parallel ranks, pipeline stages, expert servers (None: local experts)."""
ONE: Split = (1, 1, None)


@contextmanager
def running(folder: Path, model: str, split: Split, dtype: str = "float32") -> Iterator[Stack]:
    if not PATHS[model].exists():
        pytest.skip(f"{PATHS[model]} is not there: `make test` makes it")
    tensor, stages, servers = split
    engine: dict[str, Any] = {"dtype": dtype, "max_model_len": 1024, "kv_cache_memory": "256MiB"}
    if tensor * stages > 1:
        bundle = {"CPU": round(1 / (tensor * stages), 2)}
        engine |= {"tensor_parallel_size": tensor, "pipeline_parallel_size": stages, "bundle_per_rank": bundle}
    args: dict[str, Any] = {"models": [{"id": model, "path": str(PATHS[model]), "engine": engine}]}
    if model == "tiny-scout":
        args["models"][0]["max_image_tiles"] = 1
    if servers is not None:
        args["models"][0]["experts"] = {"copies": min(servers, 2)}
    config = serve_yaml(args)
    deployments = config["applications"][0]["deployments"]
    if tensor * stages > 1:
        deployments.pop()
    if servers is not None:
        cpus = {"num_cpus": 0.05}
        deployments.append({"name": f"experts-{model}", "num_replicas": servers, "ray_actor_options": cpus})
    stack = Stack(folder, config)
    stack.start()
    try:
        yield stack
    finally:
        stack.stop()


def requests_of(model: str) -> list[tuple[str, dict[str, Any]]]:
    common: dict[str, Any] = {"model": model, "max_tokens": OUTPUTS, "temperature": 0, "ignore_eos": True}
    if model != "tiny-scout":
        return [("/v1/completions", common | {"prompt": prompt, "return_token_ids": True}) for prompt in PROMPTS]
    return [("/v1/chat/completions", common | {"messages": [conversation(count)]}) for count in (0, 1, 2, 3)]


def conversation(num_images: int) -> dict[str, Any]:
    """A message about handwritten digits, which vary with their number."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": "What is the sum of these digits?"}]
    for index in digits.HELD_OUT[5 * num_images :][:num_images]:
        url = f"data:image/png;base64,{base64.b64encode(digits.png(index)).decode()}"
        parts.insert(0, {"type": "image_url", "image_url": {"url": url}})
    return {"role": "user", "content": parts}


async def ask(stack: Stack, model: str) -> list[Any]:
    """What all requests at once are answered: token ids, or the text where there are none."""
    async with httpx.AsyncClient(base_url=stack.url, timeout=200) as client:
        answers = await asyncio.gather(*(client.post(path, json=body) for path, body in requests_of(model)))
    choices = [answer.raise_for_status().json()["choices"][0] for answer in answers]
    assert all(choice["finish_reason"] == "length" for choice in choices)
    return [choice.get("token_ids") or choice["message"]["content"] for choice in choices]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What one rank with local experts answers, by model."""

    @functools.cache
    def answer(model: str) -> list[Any]:
        with running(tmp_path_factory.mktemp(model), model, ONE) as stack:
            return asyncio.run(ask(stack, model))

    return answer


@pytest.mark.parametrize(
    ("model", "split"),
    [
        ("smollm2", (3, 1, None)),
        ("smollm2", (1, 2, None)),
        ("smollm2", (3, 2, None)),
        ("smollm2-moe", (3, 1, None)),
        ("smollm2-moe", (1, 2, None)),
        ("smollm2-moe", (3, 1, 4)),
        ("smollm2-moe", (1, 2, 4)),
        ("tiny-scout", (2, 1, None)),
        ("tiny-scout", (1, 2, None)),
        ("tiny-scout", (2, 2, None)),
        ("tiny-scout", (1, 1, 4)),
        ("tiny-scout", (2, 1, 4)),
        ("tiny-scout", (2, 2, 4)),
    ],
    ids=lambda value: value if isinstance(value, str) else "tp{}-pp{}-servers{}".format(*value),
)
def test_a_split_says_what_one_rank_says(tmp_path: Path, alone: Any, model: str, split: Split) -> None:
    expected = alone(model)
    assert len({str(answer) for answer in expected}) > 1
    with running(tmp_path, model, split) as stack:
        (engine,) = httpx.get(f"{stack.url}/cluster").json()["engines"]
        assert len(engine["ranks"]) == (split[0] * split[1] if split[0] * split[1] > 1 else 0)
        assert asyncio.run(ask(stack, model)) == expected


@pytest.mark.timeout(600)
def test_any_number_of_expert_servers_says_the_same(tmp_path: Path, alone: Any) -> None:
    """1 to 8, changed in place."""
    model, expected = "smollm2-moe", alone("smollm2-moe")
    with running(tmp_path, model, (1, 1, 1)) as stack:
        for count in range(1, 9):
            deploy(stack, tmp_path / "changed.yaml", count)
            wait_for_servers(Target(stack.url, model), count, copies=1)
            assert asyncio.run(ask(stack, model)) == expected


def prompt_logprobs(stack: Stack, model: str) -> list[float]:
    body = {"model": model, "prompt": LONG, "max_tokens": 1, "prompt_logprobs": 0}
    answer = httpx.post(f"{stack.url}/v1/completions", json=body, timeout=200).raise_for_status().json()
    positions = answer["choices"][0]["prompt_logprobs"]
    return [next(iter(each.values()))["logprob"] for each in positions if each]


def test_bfloat16_stays_within_its_tolerance(tmp_path: Path) -> None:
    model = "smollm2-moe"
    with running(tmp_path / "one", model, ONE, "bfloat16") as stack:
        expected = prompt_logprobs(stack, model)
    assert len(expected) > 80
    for split in [(1, 1, 4), (3, 1, None), (3, 1, 4), (1, 2, None)]:
        with running(tmp_path / "-".join(map(str, split)), model, split, "bfloat16") as stack:
            got = prompt_logprobs(stack, model)
        error = sum(abs(a - b) for a, b in zip(got, expected, strict=True)) / len(expected)
        print(f"{split}: log probabilities differ by {error:.4f} on average")
        assert error < TOLERANCE
