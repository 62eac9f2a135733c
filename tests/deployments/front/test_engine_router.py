"""Serve's own router, with our choice of a replica in it; replicas are fakes that Serve's code accepts."""

import asyncio
import secrets
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.request_router import PendingRequest

from deployments.app import build
from deployments.front.engine_router import EngineRouter
from deployments.front.roster import Roster, roster_of

DEPLOYMENT = DeploymentID("engine-test", "moray")


def replica(name: str) -> Any:
    return SimpleNamespace(replica_id=ReplicaID(name, DEPLOYMENT), max_ongoing_requests=100)


@pytest.fixture
def roster() -> Iterator[Roster]:
    yield roster_of(DEPLOYMENT.name)
    roster_of(DEPLOYMENT.name).__init__()  # type: ignore[misc]


@pytest.fixture
async def router(roster: Roster) -> EngineRouter:
    made = EngineRouter(DEPLOYMENT, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True)
    made._probe_queue_lens = _no_probe  # type: ignore[method-assign]
    made.update_replicas([replica(name) for name in "abc"])
    return made


async def _no_probe(*_: object) -> list[object]:
    return []


def call(target: str, method: str = "generate") -> PendingRequest:
    name = secrets.token_hex(8)
    metadata = RequestMetadata(request_id=name, internal_request_id=name, call_method=method, session_id=target)
    return PendingRequest(args=[], kwargs={}, metadata=metadata)


async def chosen(router: EngineRouter, pending: PendingRequest) -> str:
    async with asyncio.timeout(0.5):
        return str((await router._choose_replica_for_request(pending)).replica_id.unique_id)


async def test_a_call_goes_to_the_replica_that_it_names(router: EngineRouter, roster: Roster) -> None:
    assert roster.replicas == ("a", "b", "c")
    assert [await chosen(router, call(name)) for name in "cabac"] == list("cabac")
    assert await chosen(router, call("", "describe")) in "abc"


async def test_a_call_to_a_replica_that_is_gone_waits_without_spinning(router: EngineRouter) -> None:
    with pytest.raises(TimeoutError):
        await chosen(router, call("z"))


async def test_a_suspect_gets_no_request_but_may_be_asked_how_it_is(router: EngineRouter, roster: Roster) -> None:
    router.on_replica_actor_unavailable(ReplicaID("b", DEPLOYMENT))
    assert roster.trusted == ["a", "c"]
    with pytest.raises(TimeoutError):
        await chosen(router, call("b"))
    assert await router.choose_replicas(router._replicas_list, call("b", "check_health")) == [
        [router._replicas_list[1]]
    ]


async def test_the_dead_leave_the_roster(router: EngineRouter, roster: Roster) -> None:
    router.on_replica_actor_died(ReplicaID("a", DEPLOYMENT))
    assert roster.replicas == ("b", "c")
    assert roster.suspects == {"a": "died"}


async def test_calls_to_a_dead_replica_do_not_hold_up_those_to_the_next(router: EngineRouter) -> None:
    """Serve has few tasks that route; a call whose replica is gone keeps one until it is cancelled."""
    router.update_replicas([replica("a")])
    router.on_replica_actor_unavailable(ReplicaID("a", DEPLOYMENT))
    stuck = [asyncio.ensure_future(router._choose_replica_for_request(call("a"))) for _ in range(6)]
    probe = asyncio.ensure_future(router._choose_replica_for_request(call("a", "check_health")))
    await asyncio.sleep(0.1)
    router.on_replica_actor_died(ReplicaID("a", DEPLOYMENT))
    router.update_replicas([replica("b")])
    late = [asyncio.ensure_future(chosen(router, call("b"))) for _ in range(6)]
    for task in (*stuck, probe):
        task.cancel()
    assert await asyncio.gather(*late) == ["b"] * 6
    assert router.curr_num_routing_tasks == 0


def test_a_copy_of_the_router_knows_this_process_s_roster() -> None:
    """Serve hands the router's class over by value, with its module's globals; what is copied there is no use."""
    application = build({"models": [{"id": "test", "path": __file__}]})
    (engine,) = application._bound_deployment.init_args[1].values()
    config = engine._bound_deployment._deployment_config.request_router_config
    check = (
        "import sys, pickle, types; from deployments.front import roster, engine_router;"
        "copied = pickle.load(sys.stdin.buffer); assert copied is not engine_router.EngineRouter;"
        "router = object.__new__(copied); router._deployment_id = types.SimpleNamespace(name='engine-test');"
        "assert router._roster is roster.roster_of('engine-test')"
    )
    serialized = config.get_serialized_request_router_cls()
    subprocess.run([sys.executable, "-c", check], input=serialized, check=True, timeout=60)
