"""An engine is ready when a probe between two steps finds every rank and every expert there."""

import asyncio
import time
from collections.abc import Callable

import pytest

from cluster.experts.client import ExpertsUnavailable
from deployments.engine.readiness import GOOD_FOR_SECONDS, Readiness
from deployments.engine.request import EngineStopping, ExpertsGone


async def test_a_probe_comes_between_the_steps_of_a_request(start: Callable, request_of: Callable) -> None:
    front = start(before=lambda _: time.sleep(0.05))
    generating = asyncio.create_task(front.engine.generate(request_of("r", [1], 40, to=front.inbox.address)))
    await front.until(lambda: bool(front.outputs))
    await asyncio.wait_for(front.engine.check_ready(), 1)
    assert not generating.done()
    await generating


async def test_what_does_not_answer_is_told_and_costs_nothing_else(start: Callable, request_of: Callable) -> None:
    front = start()
    front.engine._shard.probe_fault = ExpertsUnavailable("experts [3] of layer 1 did not answer for 1 s")
    with pytest.raises(ExpertsGone, match=r"^experts \[3\] of layer 1"):
        await front.engine.check_ready()
    front.engine.check_health()
    await front.engine.generate(request_of("r", [1], 5, to=front.inbox.address))
    front.engine._shard.probe_fault = None
    await asyncio.sleep(GOOD_FOR_SECONDS)
    await front.engine.check_ready()


async def test_all_who_ask_at_once_share_one_probe(start: Callable) -> None:
    front = start()
    await asyncio.gather(*(front.engine.check_ready() for _ in range(50)))
    assert front.engine._shard.num_probes == 1


async def test_an_engine_that_stops_is_not_ready(start: Callable) -> None:
    front = start()
    await asyncio.to_thread(front.engine.stop)
    with pytest.raises(EngineStopping):
        await front.engine.check_ready()


def test_who_asked_too_late_is_refused() -> None:
    readiness = Readiness(lambda: None)
    asked, given_up = readiness.ask(), readiness.ask()
    assert given_up.cancel()
    readiness.refuse(EngineStopping("the engine is shutting down"))
    with pytest.raises(EngineStopping):
        asked.result(0)
