"""The step thread with a fake executor and a real channel: what a front would see."""

import asyncio
import os
import time
from collections.abc import Callable

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.experts.client import ExpertsUnavailable
from deployments.engine.request import EngineStopping, ExpertsGone, QueueFull, RequestTooLong, StepFailed
from tests.deployments.engine.conftest import Front


async def test_64_requests_in_a_cache_of_4000_tokens_get_the_tokens_they_would_get_alone(
    start: Callable[..., Front], request_of: Callable, completion_of: Callable
) -> None:
    front = start(250)
    prompts = [[number, *range(number % 50)] for number in range(64)]
    async with asyncio.timeout(60):
        await asyncio.gather(
            *(
                front.engine.generate(request_of(str(number), prompt, 256, to=front.inbox.address))
                for number, prompt in enumerate(prompts)
            )
        )
    await front.until(lambda: len(front.last) == 64 and all(d.finish_reason for d in front.last.values()))
    for number, prompt in enumerate(prompts):
        assert front.outputs[str(number), 0] == completion_of(prompt, 256)
        assert front.last[str(number), 0].finish_reason == "length"
    assert front.engine._loop._scheduler.counts.preemptions > 0
    assert front.pool.leaks() == []


async def test_one_message_a_step_carries_all_of_a_fronts_tokens(start: Callable, request_of: Callable) -> None:
    front = start()
    async with asyncio.timeout(20):
        await asyncio.gather(
            *(front.engine.generate(request_of(str(i), [i], 50, to=front.inbox.address)) for i in range(8))
        )
    await front.until(lambda: sum(map(len, front.outputs.values())) == 400)
    assert front.messages == front.executor.num_steps < 60


async def test_choices_share_the_prompt(start: Callable, request_of: Callable, completion_of: Callable) -> None:
    front = start()
    prompt = list(range(100))
    await front.engine.generate(request_of("r", prompt, 20, n=4, to=front.inbox.address))
    await front.until(lambda: sum(map(len, front.outputs.values())) == 80)
    assert all(front.outputs["r", index] == completion_of(prompt, 20) for index in range(4))
    assert front.cached == {("r", 0): 0, ("r", 1): 96, ("r", 2): 96, ("r", 3): 96}


async def test_choices_that_end_in_one_step_fail_nobody(
    start: Callable, request_of: Callable, completion_of: Callable
) -> None:
    """The second choice to end once found its request gone, and took the whole step down with it."""
    front = start()
    address = front.inbox.address
    many, other = request_of("many", [1, 2, 3], 20, n=4, to=address), request_of("other", [4, 5], 60, to=address)
    await asyncio.gather(front.engine.generate(many), front.engine.generate(other))
    await front.until(lambda: front.last["other", 0].finish_reason is not None)
    assert front.outputs["other", 0] == completion_of([4, 5], 60)
    assert front.engine._loop._consecutive_failures == 0
    families = text_string_to_metric_families(front.engine.metrics())
    failures = [sample.value for family in families for sample in family.samples if "fail" in family.name]
    assert failures
    assert not any(failures)


async def test_cancelling_frees_the_blocks_and_nothing_more_is_sent(start: Callable, request_of: Callable) -> None:
    front = start()
    task = asyncio.create_task(front.engine.generate(request_of("r", [1] * 40, 2000, n=2, to=front.inbox.address)))
    await front.until(lambda: len(front.outputs) == 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await front.until(lambda: front.pool.num_free == front.pool.num_blocks)
    await asyncio.sleep(0.05)
    steps = front.executor.num_steps
    await asyncio.sleep(0.05)
    assert front.executor.num_steps == steps
    assert len(front.outputs["r", 0]) < 2000


async def test_a_failing_step_fails_its_requests_and_the_next_ones_work(
    start: Callable, request_of: Callable, completion_of: Callable
) -> None:
    def before(batch: object) -> None:
        if 666 in batch.tokens:
            raise RuntimeError("out of luck")

    front = start(before=before)
    with pytest.raises(StepFailed, match="RuntimeError: out of luck"):
        await front.engine.generate(request_of("bad", [1, 666], 5, to=front.inbox.address))
    assert front.pool.leaks() == []
    await front.engine.generate(request_of("good", [1, 2], 5, to=front.inbox.address))
    await front.until(lambda: front.outputs.get(("good", 0)) == completion_of([1, 2], 5))
    front.engine.check_health()
    for number in range(3):
        with pytest.raises(StepFailed):
            await front.engine.generate(request_of(f"bad{number}", [1, 666], 5, to=front.inbox.address))
    with pytest.raises(RuntimeError, match="last 3 steps failed"):
        front.engine.check_health()


async def test_missing_experts_fail_requests_but_not_the_engine(
    start: Callable, request_of: Callable, completion_of: Callable
) -> None:
    gone = True

    def before(batch: object) -> None:
        if gone:
            raise ExpertsUnavailable("experts [3] of layer 1 did not answer")

    front = start(before=before)
    for number in range(4):
        with pytest.raises(ExpertsGone, match=r"^experts \[3\] of layer 1"):
            await front.engine.generate(request_of(f"bad{number}", [1, 2], 5, to=front.inbox.address))
    front.engine.check_health()
    gone = False
    await front.engine.generate(request_of("good", [1, 2], 5, to=front.inbox.address))
    await front.until(lambda: front.outputs.get(("good", 0)) == completion_of([1, 2], 5))


async def test_a_full_queue_refuses_and_empties(start: Callable, request_of: Callable) -> None:
    front = start(max_num_seqs=2, max_waiting_requests=3)
    tasks = [
        asyncio.create_task(front.engine.generate(request_of(str(i), [i], 1500, to=front.inbox.address)))
        for i in range(5)
    ]
    await front.until(lambda: len(front.outputs) == 2)
    with pytest.raises(QueueFull) as refused:
        await front.engine.generate(request_of("more", [1], 1, to=front.inbox.address))
    assert refused.value.waiting == 3
    assert refused.value.retry_after >= 1
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await front.until(lambda: not front.engine._loop._requests)
    await front.engine.generate(request_of("more", [1], 1, to=front.inbox.address))


async def test_what_cannot_fit_and_an_id_in_use_are_refused(start: Callable, request_of: Callable) -> None:
    front = start(10)
    with pytest.raises(RequestTooLong):
        await front.engine.generate(request_of("long", [1] * 100, 100, to=front.inbox.address))
    task = asyncio.create_task(front.engine.generate(request_of("r", [1], 100, to=front.inbox.address)))
    await asyncio.sleep(0)
    with pytest.raises(ValueError, match="in use"):
        await front.engine.generate(request_of("r", [1], 100, to=front.inbox.address))
    await task


async def test_stopping_fails_what_is_left(start: Callable, request_of: Callable) -> None:
    front = start()
    task = asyncio.create_task(front.engine.generate(request_of("r", [1], 2000, to=front.inbox.address)))
    await front.until(lambda: bool(front.outputs))
    await asyncio.to_thread(front.engine.stop)
    with pytest.raises(EngineStopping, match="shut down"):
        await task
    with pytest.raises(RuntimeError, match="not running"):
        front.engine.check_health()


async def test_description_and_metrics(start: Callable, request_of: Callable) -> None:
    front = start()
    await front.engine.generate(request_of("r", list(range(40)), 5, to=front.inbox.address))
    await front.engine.generate(request_of("s", list(range(40)), 5, to=front.inbox.address))
    description = front.engine.describe()
    assert (description.model_id, description.max_model_len, description.num_kv_tokens) == ("fake", 2048, 4000)
    await front.until(lambda: not front.engine._loop._requests)
    families = text_string_to_metric_families(front.engine.metrics())
    values = {s.name: s.value for family in families for s in family.samples if "le" not in s.labels}
    assert values["vllm:prompt_tokens_total"] == 80
    assert values["vllm:generation_tokens_total"] == 10
    assert values["vllm:prefix_cache_queries_total"] == 80
    assert values["vllm:prefix_cache_hits_total"] == 32
    assert values["vllm:num_requests_running"] == values["vllm:kv_cache_usage_perc"] == 0
    assert values["vllm:request_queue_time_seconds_count"] == values["vllm:request_decode_time_seconds_count"] == 2


async def test_a_heartbeat_comes_while_a_step_takes_long_and_only_where_requests_came_from(
    start: Callable, request_of: Callable
) -> None:
    front = start(before=lambda _: time.sleep(1.3))
    await asyncio.sleep(0.7)
    assert front.beats == 0
    await front.engine.generate(request_of("r", [1], 1, to=front.inbox.address))
    await front.until(lambda: front.messages == 1)
    assert 1 <= front.beats <= 3
    assert front.engine_id == front.engine.status().replica_id


async def test_status(start: Callable, request_of: Callable) -> None:
    front = start(before=lambda _: time.sleep(0.2), max_num_seqs=1)
    address = front.inbox.address
    calls = asyncio.gather(*(front.engine.generate(request_of(str(i), [i], 3, to=address)) for i in range(2)))
    await front.until(lambda: bool(front.outputs))
    status = front.engine.status()
    assert (status.model, status.pid, status.running, status.waiting) == ("fake", os.getpid(), 1, 1)
    assert 0 < status.kv_cache_usage < 0.1
    await calls
