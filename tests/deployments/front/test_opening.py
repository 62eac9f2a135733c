"""A front before and after its models are there."""

import asyncio
from collections.abc import Callable

import httpx
import pytest

from cluster.starting import Phase
from deployments.config import FrontConfig
from deployments.front.opening import Opening, early_api
from deployments.status import ClusterStatus, StartingStatus

PHASE = Phase("engine-tiny/e0", 7, "127.0.0.1", "waiting for experts: 3 experts are on no server yet", 10.0, 12.5)


async def cluster() -> ClusterStatus:
    return ClusterStatus(starting=[StartingStatus.of(PHASE)])


def opening(patience_s: float = 60.0, **config: object) -> Opening:
    return Opening(early_api(FrontConfig(**config), cluster, lambda: [PHASE]), patience_s)  # type: ignore[arg-type]


def client_of(app: Opening) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front")


async def test_health_and_cluster_tell_what_is_waited_for() -> None:
    async with client_of(opening()) as client:
        health = await client.get("/health")
        assert health.status_code == 503
        assert health.headers["retry-after"] == "5"
        assert health.json()["error"] == {
            "message": f"The server is starting: engine-tiny/e0: {PHASE.phase}",
            "type": "server_error",
            "param": None,
            "code": "server_starting",
        }
        [starting] = (await client.get("/cluster")).json()["starting"]
        assert starting == {
            "pid": 7, "host": "127.0.0.1", "process": "engine-tiny/e0", "phase": PHASE.phase, "seconds": 2.5
        }  # fmt: skip


async def test_a_route_prefix_is_not_part_of_the_path() -> None:
    transport = httpx.ASGITransport(opening(patience_s=0.1), root_path="/moray")
    async with httpx.AsyncClient(transport=transport, base_url="http://front") as client:
        assert "engine-tiny/e0" in (await client.get("/moray/health")).text


async def test_the_cluster_is_shown_to_those_with_a_key() -> None:
    async with client_of(opening(api_keys=["secret"])) as client:
        assert (await client.get("/cluster")).status_code == 401
        assert (await client.get("/cluster", headers={"authorization": "Bearer secret"})).status_code == 200
        assert (await client.get("/health")).status_code == 503


async def test_a_request_waits_until_all_is_served(make_app: Callable) -> None:
    app = opening()
    async with client_of(app) as client:
        body = {"model": "tiny", "prompt": "abc", "max_tokens": 3}
        asked = asyncio.create_task(client.post("/v1/completions", json=body))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(asked), 0.2)
        app.open(make_app())
        assert (await asked).json()["usage"]["completion_tokens"] == 3
        assert (await client.get("/health")).json() == {"status": "ok", "models": ["tiny"]}


async def test_a_request_does_not_wait_for_ever() -> None:
    async with client_of(opening(patience_s=0.1)) as client:
        response = await client.get("/v1/models")
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "server_starting"
        assert response.headers["retry-after"] == "5"
