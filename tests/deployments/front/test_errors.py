"""Bad input and refusals: the right status, OpenAI's shape, the field at fault, and the server goes on."""

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from deployments.engine.request import QueueFull, RequestTooLong
from deployments.front.engine_client import EngineFailure, EngineUnavailable
from deployments.front.protocol.response import ErrorResponse

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "tiny", "prompt": "ab"}


def error(response: httpx.Response) -> dict[str, Any]:
    ErrorResponse.model_validate_json(response.content, strict=True)
    return response.json()["error"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 1.1}, "min_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": "1"}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ""}, "stop[0]"),
        ({"stop": [1]}, "stop[0]"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {"257": 1}}, "logit_bias"),
        ({"stop_token_ids": [257]}, "stop_token_ids"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 199}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [257]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": "a" * 200}, "prompt"),
    ],
)
async def test_a_bad_field_is_named(client, fields, param):
    response = await client.post("/v1/completions", json={**TEXT, **fields})
    assert response.status_code == 400
    assert error(response)["param"] == param
    assert error(response)["type"] == "invalid_request_error"
    assert param in error(response)["message"] or error(response)["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"text": "typeless"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].image_url"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"detail": "auto"}}]}]},
            "messages[0].content[0].image_url.url",
        ),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"chat_template": "x"}, "chat_template"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
    ],
)
async def test_a_bad_field_of_a_chat_is_named(client, fields, param):
    response = await client.post("/v1/chat/completions", json={**CHAT, **fields})
    assert response.status_code == 400
    assert error(response)["param"] == param


async def test_an_unknown_field_is_refused_with_the_nearest_name(client):
    response = await client.post("/v1/completions", json={**TEXT, "temprature": 1})
    assert error(response)["code"] == "unknown_parameter"
    assert "'temperature'" in error(response)["message"]


async def test_a_prompt_beyond_the_context_is_told_both_numbers(client):
    response = await client.post("/v1/completions", json={**TEXT, "prompt": "a" * 150, "max_tokens": 100})
    assert error(response)["code"] == "context_length_exceeded"
    assert "200 tokens" in error(response)["message"]
    assert "250 tokens" in error(response)["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[1]",
        b'{"model":"tiny","prompt":"\xff"}',
        b'{"model":"tiny","prompt":"\\ud800"}',
        b'{"model":"tiny","prompt":"a","temperature":NaN}',
        b'{"model":"tiny","prompt":"a","temperature":Infinity}',
        b'{"model":"tiny","prompt":"a","temperature":1e999}',
        b'{"model":"tiny","prompt":"a","seed":' + b"9" * 10_000 + b"}",
        b'{"model":"tiny","prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model":"tiny","prompt":"a","metadata":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
    ],
)
async def test_a_malformed_body_is_refused(client, body):
    response = await client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    error(response)
    assert (await client.post("/v1/completions", json=TEXT)).status_code == 200


async def test_an_unknown_model_is_not_found(client):
    for response in (
        await client.post("/v1/completions", json={**TEXT, "model": "gpt"}),
        await client.post("/tokenize", json={**TEXT, "model": "gpt"}),
        await client.get("/v1/models/org/gpt"),
    ):
        assert response.status_code == 404
        assert error(response)["code"] == "model_not_found"


async def test_routing_errors_have_the_shape(client):
    response = await client.get("/v1/nothing")
    assert response.status_code == 404
    error(response)
    response = await client.get("/v1/completions")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    error(response)
    response = await client.post("/v1/completions", content=b"a=b", headers={"content-type": "text/plain"})
    assert response.status_code == 415
    error(response)


async def test_a_huge_body_is_refused_announced_or_not(make_app):
    sent = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 1000
            yield b" " * 1000

    transport = httpx.ASGITransport(app=make_app(max_body_size=5000))
    async with httpx.AsyncClient(transport=transport, base_url="http://front") as client:
        response = await client.post("/v1/completions", json={**TEXT, "prompt": "a" * 6000})
        assert response.status_code == 413
        error(response)
        headers = {"content-type": "application/json"}
        response = await client.post("/v1/completions", content=chunks(), headers=headers)
        assert response.status_code == 413
        assert sent < 30_000  # it does not read for ever


async def test_a_body_somewhat_too_large_is_read_to_its_end(make_app):
    """A client that still wrote when the connection closed once saw a reset instead of the 413."""
    sent = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(12):
            sent += 1000
            yield b" " * 1000

    transport = httpx.ASGITransport(app=make_app(max_body_size=5000))
    async with httpx.AsyncClient(transport=transport, base_url="http://front") as client:
        for announced in ({}, {"content-length": "12000"}):
            sent = 0
            headers = {"content-type": "application/json", **announced}
            response = await client.post("/v1/completions", content=chunks(), headers=headers)
            assert response.status_code == 413
            assert sent == 12_000


async def test_a_long_name_is_not_sent_back_whole(client):
    response = await client.post("/v1/completions", json={**TEXT, "a" * 100_000: 1})
    assert response.status_code == 400
    assert error(response)["code"] == "unknown_parameter"
    assert len(response.content) < 1000


async def test_api_keys(make_app):
    transport = httpx.ASGITransport(app=make_app(api_keys=["sesame", "other"]))
    async with httpx.AsyncClient(transport=transport, base_url="http://front") as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic sesame"}):
            for path in ("/v1/completions", "/tokenize"):
                response = await client.post(path, json=TEXT, headers=headers)
                assert response.status_code == 401
                assert error(response)["code"] == "invalid_api_key"
            assert (await client.get("/v1/models", headers=headers)).status_code == 401
        response = await client.post("/v1/completions", json=TEXT, headers={"authorization": "Bearer other"})
        assert response.status_code == 200
        assert (await client.get("/health")).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("refusal", "status", "code"),
    [
        (QueueFull(7, 2.5), 429, "queue_full"),
        (RequestTooLong("does not fit the KV cache"), 400, "context_length_exceeded"),
        (EngineUnavailable("gone"), 503, "engine_unavailable"),
        (EngineFailure("out of order"), 500, "engine_error"),
        (ZeroDivisionError(), 500, "internal_error"),
    ],
)
async def test_an_engine_that_refuses(client, engine, refusal, status, code, stream):
    engine.refusal = refusal
    for prompt in ("ab", ["ab", "cd"]):
        response = await client.post("/v1/completions", json={**TEXT, "prompt": prompt, "stream": stream})
        assert response.status_code == status
        assert error(response)["code"] == code
        assert response.headers.get("retry-after") == {429: "3", 503: "1"}.get(status)
    assert engine.running == 0
