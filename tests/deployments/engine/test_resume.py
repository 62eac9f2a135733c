"""A request that another engine began: the tokens go on as if nothing had happened."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from deployments.engine.blocks import BlockPool
from deployments.engine.request import EngineRequest
from deployments.engine.scheduler import Limits, Scheduler
from tests.deployments.engine.conftest import Front


@pytest.mark.parametrize("known", [0, 1, 7, 19])
async def test_the_rest_of_the_tokens_come_at_their_offsets(
    start: Callable[..., Front], request_of: Callable, completion_of: Callable, known: int
) -> None:
    front = start()
    prompt = list(range(50))
    tokens = completion_of(prompt, 20)
    request = request_of("r", prompt, 20, to=front.inbox.address)
    front.outputs["r", 0] = tokens[:known]
    await front.engine.generate(replace(request, outputs=(tuple(tokens[:known]),)))
    await front.until(lambda: len(front.outputs["r", 0]) == 20)
    assert front.outputs["r", 0] == tokens
    assert front.last["r", 0].finish_reason == "length"
    assert front.pool.leaks() == []


async def test_choices_go_on_each_from_its_own_place_and_finished_ones_do_not(
    start: Callable[..., Front], request_of: Callable, completion_of: Callable
) -> None:
    front = start()
    prompt = list(range(50))
    tokens = completion_of(prompt, 20)
    for index, known in ((0, 20), (1, 3), (3, 12)):
        front.outputs["r", index] = tokens[:known]
    request = request_of("r", prompt, 20, n=4, to=front.inbox.address)
    await front.engine.generate(replace(request, outputs=(None, tuple(tokens[:3]), (), tuple(tokens[:12]))))
    await front.until(lambda: all(len(front.outputs.get(("r", index), [])) == 20 for index in (1, 2, 3)))
    assert all(front.outputs["r", index] == tokens for index in range(4))
    assert ("r", 0) not in front.last


async def test_prompt_logprobs_are_not_computed_twice(start: Callable[..., Front], request_of: Callable) -> None:
    front = start()
    request = request_of("r", list(range(40)), 8, to=front.inbox.address, prompt_logprobs=0)
    front.outputs["r", 0] = [1, 2]
    await front.engine.generate(replace(request, outputs=((1, 2),)))
    await front.until(lambda: ("r", 0) in front.last and front.last["r", 0].finish_reason is not None)
    assert all(delta.prompt_logprobs is None for delta in front.last.values())


async def test_a_full_queue_refuses_no_request_that_was_taken_elsewhere(
    start: Callable[..., Front], request_of: Callable, completion_of: Callable
) -> None:
    front = start(max_waiting_requests=0, max_num_seqs=1)
    tokens = completion_of([5], 8)
    long = request_of("long", [1], 400, to=front.inbox.address)
    resumed = replace(request_of("r", [5], 8, to=front.inbox.address), outputs=((),))
    await asyncio.gather(front.engine.generate(long), front.engine.generate(resumed))
    await front.until(lambda: len(front.outputs.get(("r", 0), [])) == 8)
    assert front.outputs["r", 0] == tokens


def test_it_starts_before_those_that_wait(request_of: Callable[..., EngineRequest], scheduler: Scheduler) -> None:
    scheduler.add(request_of("waiting", [1], 8))
    scheduler.add(replace(request_of("first", [2], 8), outputs=((3,),)))
    scheduler.add(replace(request_of("second", [2], 8, n=2), outputs=((3,), (4,))))
    scheduler.add(request_of("last", [1], 8))
    assert [sequence.request.request_id for sequence in scheduler.waiting] == ["first", "second", "waiting", "last"]


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler(BlockPool(100), Limits(8, 64, 200, 4))
