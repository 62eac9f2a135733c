"""How answers end before their time: a failing engine, a client that goes away."""

import asyncio
import json
from typing import Any

import pytest

from deployments.front.engine_client import EngineUnavailable


class Connection:
    """An ASGI connection whose client can leave."""

    def __init__(self, path: str, body: dict[str, Any]) -> None:
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": [(b"content-type", b"application/json")],
        }
        self.left = asyncio.Event()
        self.sent: list[dict[str, Any]] = []
        self._body: bytes | None = json.dumps(body).encode()

    async def receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)


TEXT = {"model": "tiny", "prompt": "ab"}


@pytest.fixture(params=[{"stream": True}, {"stream": False}, {"prompt": ["a", "b"], "n": 2}], ids=str)
def body(request):
    return {**TEXT, **request.param}


async def _until_running(engine) -> None:
    async with asyncio.timeout(5):
        while not engine.running:
            await asyncio.sleep(0)
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_client_that_leaves_aborts_its_request(make_app, engine, body):
    engine.hangs_after = 2
    connection = Connection("/v1/completions", body)
    answering = asyncio.ensure_future(make_app()(connection.scope, connection.receive, connection.send))
    await _until_running(engine)
    connection.left.set()
    await asyncio.wait_for(answering, 5)
    assert engine.running == 0
    assert len(engine.aborted) == len(engine.requests)


async def test_a_cancelled_call_aborts_its_request(make_app, engine, body):
    engine.hangs_after = 2
    connection = Connection("/v1/completions", body)
    answering = asyncio.ensure_future(make_app()(connection.scope, connection.receive, connection.send))
    await _until_running(engine)
    answering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await answering
    assert engine.running == 0
    assert len(engine.aborted) == len(engine.requests)


async def test_aborts_are_counted(make_app, engine, client):
    app = make_app()
    engine.hangs_after = 1
    connection = Connection("/v1/completions", TEXT)
    answering = asyncio.ensure_future(app(connection.scope, connection.receive, connection.send))
    await _until_running(engine)
    connection.left.set()
    await answering
    metrics = Connection("/metrics", {})
    metrics.scope["method"] = "GET"
    await app(metrics.scope, metrics.receive, metrics.send)
    text = b"".join(message.get("body", b"") for message in metrics.sent).decode()
    assert 'vllm:request_success_total{finished_reason="abort",front="front-0",model_name="tiny"} 1.0' in text


@pytest.mark.parametrize(
    ("failure", "code"), [(EngineUnavailable("died"), "engine_unavailable"), (KeyError("x"), "internal_error")]
)
async def test_a_failure_within_a_stream_is_its_last_event(client, engine, failure, code):
    engine.failure, engine.fails_after = failure, 3
    response = await client.post("/v1/completions", json={**TEXT, "stream": True})
    assert response.status_code == 200
    *events, end = response.text.split("\n\n")
    assert end == ""
    texts = [json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events[:-1]]
    assert texts == ["H", "e", "l"]
    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == code
    assert engine.running == 0
    engine.failure = None
    assert (await client.post("/v1/completions", json=TEXT)).status_code == 200


async def test_a_failure_of_a_whole_answer_is_its_status(client, engine):
    engine.failure, engine.fails_after = EngineUnavailable("died"), 3
    response = await client.post("/v1/completions", json=TEXT)
    assert response.status_code == 503


async def test_a_stream_that_waits_is_kept_alive(make_app, engine, monkeypatch):
    monkeypatch.setattr("deployments.front.answer.KEEP_ALIVE_SECONDS", 0.05)
    engine.hangs_after = 2
    connection = Connection("/v1/completions", {**TEXT, "stream": True})
    task = asyncio.create_task(make_app()(connection.scope, connection.receive, connection.send))
    async with asyncio.timeout(5):
        while sum(message.get("body") == b": keep-alive\n\n" for message in connection.sent) < 2:
            await asyncio.sleep(0.01)
    connection.left.set()
    await task
    assert engine.running == 0
