"""Serve starts expert servers when they are busy and takes them away again, and no client notices."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.soak.load import Answers, load, prompts_of
from benchmarks.soak.stacks import MODEL, serve_config
from benchmarks.soak.target import Target
from deployments.experts.autoscaling import POLICY
from tests.stack import ROOT, Stack, needs_moe

pytestmark = needs_moe

EXAMPLE = ROOT / "configs/smollm2-moe-autoscaled.yaml"
SOON = {"metrics_interval_s": 1, "look_back_period_s": 5, "upscale_delay_s": 3, "downscale_delay_s": 8}
"""The example with less patience. Serve warns that it will do without the first one day."""


def example() -> tuple[dict[str, Any], dict[str, Any]]:
    """On a free port, and its `autoscaling_config`."""
    config = serve_config(EXAMPLE)
    return config, config["applications"][0]["deployments"][-1]["autoscaling_config"]


@pytest.mark.timeout(400)
async def test_their_number_follows_the_load(tmp_path: Path) -> None:
    config, autoscaling = example()
    autoscaling.update(SOON)
    stack = Stack(tmp_path, config)
    stack.start()
    try:
        target, prompts = Target(stack.url, MODEL), prompts_of(MODEL, 12)
        assert target.num_servers() == autoscaling["min_replicas"]
        calm = await load(stack.url, MODEL, prompts[:4], 1, 0, 6)
        many = asyncio.create_task(load(stack.url, MODEL, prompts, 12, 0, 75))
        await asyncio.to_thread(wait, target, lambda number: number > autoscaling["min_replicas"], 70)
        rough = await many
        few = asyncio.create_task(load(stack.url, MODEL, prompts, 2, 0.25, 60))
        await asyncio.to_thread(wait, target, lambda number: number == autoscaling["min_replicas"], 90)
        for answers in (rough, gentle := await few):
            assert not answers.lost
        assert rough.num_answers > 20
        assert gentle.num_answers > 5
        assert all(len(answers) == 1 for answers in tokens_of(calm, rough, gentle).values())
    finally:
        stack.stop()


def wait(target: Target, is_enough: Callable[[float], bool], seconds: float) -> None:
    """Until so many servers are known to the directory, with two copies of everything."""
    begun = time.monotonic()
    while not is_enough(number := target.num_servers()) or target.fewest_copies() < 2:
        assert time.monotonic() < begun + seconds, f"still {number:.0f} servers after {seconds:.0f} s"
        time.sleep(2)
    print(f"{number:.0f} expert servers after {time.monotonic() - begun:.0f} s")


def tokens_of(*some: Answers) -> dict[str, set[tuple[int, ...]]]:
    """By prompt, over all of them."""
    together: dict[str, set[tuple[int, ...]]] = {}
    for answers in some:
        for prompt, tokens in answers.tokens.items():
            together.setdefault(prompt, set()).update(tokens)
    return together


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (None, r"experts-smollm2-moe has no policy.*: add `policy: "),
        ({"policy_function": POLICY, "policy_kwargs": {"target_busy_share": 7}}, r"target_busy_share is 7; it must be"),
    ],
)
def test_what_would_have_no_effect_is_refused(tmp_path: Path, policy: dict[str, Any] | None, message: str) -> None:
    config, autoscaling = example()
    del autoscaling["policy"]
    autoscaling.update({} if policy is None else {"policy": policy})
    stack = Stack(tmp_path, config)
    with pytest.raises(pytest.fail.Exception, match=message):
        stack.start()
