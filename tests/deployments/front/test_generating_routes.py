"""Both generating endpoints, whole and streamed; every answer is held against its documented model."""

import json
from itertools import chain
from typing import Any

import httpx
import pytest

from deployments.front.protocol.response import ChatChunk, ChatCompletion, Completion

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "tiny", "prompt": "ab"}


async def chat(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await client.post("/v1/chat/completions", json={**CHAT, **fields})
    assert response.status_code == 200, response.text
    ChatCompletion.model_validate_json(response.content, strict=True)
    return response.json()


async def complete(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await client.post("/v1/completions", json={**TEXT, **fields})
    assert response.status_code == 200, response.text
    Completion.model_validate_json(response.content, strict=True)
    return response.json()


async def stream(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = await client.post(path, json={**body, "stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    model = ChatChunk if "chat" in path else Completion
    for event in events:
        model.model_validate_json(event.removeprefix("data: "), strict=True)
    return [json.loads(event.removeprefix("data: ")) for event in events]


async def test_chat_renders_the_template_and_answers(client, engine):
    answer = await chat(client)
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello, world!", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    _, prompt, sampling, _ = engine.requests[0]
    assert bytes(prompt) == b"<user>hi</><assistant>"
    assert sampling.max_tokens == 200 - len(prompt)
    assert sampling.stop_token_ids == (256,)
    assert answer["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": 14,
        "total_tokens": len(prompt) + 14,
        "prompt_tokens_details": {"cached_tokens": 4},
    }


async def test_chat_takes_text_parts_and_developer_messages(client, engine):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    await chat(client, messages=[{"role": "developer", "content": "be"}, {"role": "user", "content": parts}])
    assert bytes(engine.requests[0][1]) == b"<system>be</><user>a\nb</><assistant>"


async def test_a_final_message_is_continued(client, engine):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well"}]
    await chat(client, messages=messages, continue_final_message=True, add_generation_prompt=False)
    assert bytes(engine.requests[0][1]) == b"<user>hi</><assistant>Well"


async def test_a_chat_stream_begins_with_roles_and_ends_with_usage(client):
    events = await stream(client, "/v1/chat/completions", {**CHAT, "n": 2, "stream_options": {"include_usage": True}})
    assert [event["choices"][0]["delta"] for event in events[:2]] == [{"role": "assistant", "content": ""}] * 2
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 28
    for index in range(2):
        mine = [c for event in events for c in event["choices"] if c["index"] == index]
        assert "".join(c["delta"]["content"] for c in mine) == "Hello, world!"
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == ["stop"]
    assert len({event["id"] for event in events}) == 1


async def test_usage_so_far_in_every_chunk(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = await stream(client, "/v1/completions", {**TEXT, "max_tokens": 3, "stream_options": options})
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 2, 3, 3]


@pytest.mark.parametrize(("include", "text"), [(False, "Hello, "), (True, "Hello, wor")])
async def test_a_stop_string_ends_a_choice_and_aborts_it(client, engine, include, text):
    answer = await complete(client, stop=["xx", "wor"], include_stop_str_in_output=include, logprobs=0)
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (text, "stop", "wor")
    assert len(choice["logprobs"]["tokens"]) == answer["usage"]["completion_tokens"] == 10
    assert len(engine.aborted) == 1
    assert engine.running == 0


async def test_a_stop_string_is_held_back_in_a_stream(client):
    events = await stream(client, "/v1/completions", {**TEXT, "stop": "lo, x"})
    assert "".join(event["choices"][0]["text"] for event in events) == "Hello, world!"
    assert "lo, w" in [event["choices"][0]["text"] for event in events]


async def test_other_choices_go_on_after_one_found_its_stop_string(client, engine):
    engine.answers = (tuple(b"ab|cdef"), tuple(b"abcdefgh"))
    answer = await complete(client, n=2, stop="|", max_tokens=8)
    assert [c["text"] for c in answer["choices"]] == ["ab", "abcdefgh"]
    assert [c["finish_reason"] for c in answer["choices"]] == ["stop", "length"]


async def test_stop_token_ids_and_ignored_eos(client, engine):
    answer = await complete(client, stop_token_ids=[ord(",")])
    assert (answer["choices"][0]["text"], answer["choices"][0]["stop_reason"]) == ("Hello", ord(","))
    answer = await complete(client, ignore_eos=True, max_tokens=16)
    assert answer["choices"][0]["text"] == "Hello, world!He"
    assert engine.requests[-1][2].stop_token_ids == ()


async def test_no_chunk_holds_a_broken_character(client, engine):
    engine.answers = ((*"né€😀".encode(), 256),)
    events = await stream(client, "/v1/completions", TEXT)
    assert [event["choices"][0]["text"] for event in events] == ["n", "é", "€", "😀", ""]


async def test_prompts_and_choices_keep_their_index(client, engine):
    engine.answers = (tuple(b"xyz"), tuple(b"uvw"))
    body = {"model": "tiny", "prompt": [[65], [66, 67]], "n": 2, "max_tokens": 3, "echo": True}
    whole = (await complete(client, **body))["choices"]
    assert [(c["index"], c["text"]) for c in whole] == [(0, "Axyz"), (1, "Auvw"), (2, "BCxyz"), (3, "BCuvw")]
    texts = [""] * 4
    for event in await stream(client, "/v1/completions", body):
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert texts == [c["text"] for c in whole]


async def test_chat_logprobs(client):
    answer = await chat(client, logprobs=True, top_logprobs=3)
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == 14
    assert content[0] == {
        "token": "H",
        "logprob": -0.5,
        "bytes": [72],
        "top_logprobs": [
            {"token": "H", "logprob": -0.5, "bytes": [72]},
            {"token": "x", "logprob": -1.5, "bytes": [120]},
            {"token": "y", "logprob": -9999.0, "bytes": [121]},
        ],
    }
    events = await stream(client, "/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 3})
    streamed = [e for event in events for e in (event["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert streamed == content


async def test_echoed_logprobs_begin_with_the_prompt(client):
    answer = await complete(client, echo=True, logprobs=2, max_tokens=2)
    choice = answer["choices"][0]
    assert choice["text"] == "abHe"
    assert choice["logprobs"]["tokens"] == ["a", "b", "H", "e"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5, -0.5]
    assert choice["logprobs"]["top_logprobs"] == [None, *({t: -0.5, "x": -1.5} for t in "bHe")]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3]
    events = await stream(client, "/v1/completions", {**TEXT, "echo": True, "logprobs": 2, "max_tokens": 2, "n": 2})
    for index in range(2):
        logprobs = [e["choices"][0]["logprobs"] for e in events if e["choices"][0]["index"] == index]
        joined = {key: list(chain.from_iterable(part[key] for part in logprobs)) for key in logprobs[0]}
        assert joined == choice["logprobs"]


async def test_only_the_prompt_is_reported(client):
    answer = await complete(client, echo=True, logprobs=1, max_tokens=0)
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("ab", "length")
    assert choice["logprobs"]["tokens"] == ["a", "b"]
    assert answer["usage"]["completion_tokens"] == 0


async def test_prompt_logprobs_and_token_ids(client):
    entry = {"98": {"logprob": -0.5, "rank": 1, "decoded_token": "b"}}
    answer = await complete(client, prompt_logprobs=1, return_token_ids=True, max_tokens=2)
    assert answer["choices"][0]["prompt_logprobs"] == [None, entry]
    assert answer["choices"][0]["prompt_token_ids"] == [97, 98]
    assert answer["choices"][0]["token_ids"] == [72, 101]
    answer = await chat(client, prompt_logprobs=0, return_tokens_as_token_ids=True, logprobs=True)
    assert answer["prompt_logprobs"][1]["117"]["decoded_token"] == "u"
    assert answer["choices"][0]["logprobs"]["content"][0]["token"] == "token_id:72"


async def test_every_sampling_field_reaches_the_engine(client, engine):
    await complete(
        client,
        temperature=0.5,
        top_k=-1,
        top_p=0.9,
        min_p=0.1,
        presence_penalty=1,
        frequency_penalty=-1.5,
        repetition_penalty=1.1,
        logit_bias={"5": -100},
        seed=-7,
        min_tokens=2,
        max_tokens=9,
        n=3,
        best_of=3,
    )
    _, _, sampling, n = engine.requests[0]
    assert n == 3
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.5, 0, 0.9, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (1, -1.5, 1.1)
    assert (sampling.logit_bias, sampling.min_tokens, sampling.max_tokens) == ({5: -100.0}, 2, 9)
    assert 0 <= sampling.seed < 2**63
    await complete(client)
    await complete(client)
    assert engine.requests[1][2].seed != engine.requests[2][2].seed


async def test_null_means_default_and_harmless_fields_pass(client, engine):
    await chat(client, temperature=None, stop=None, n=None, tools=None, stream=None, user="me", metadata={"a": "b"})
    await chat(client, tools=[], tool_choice="none", store=False, response_format={"type": "text"})
    assert engine.requests[0][2].temperature == 1.0


async def test_the_default_length_of_a_completion_is_cut_to_the_context(client, engine):
    await complete(client, prompt="a" * 195)
    assert engine.requests[0][2].max_tokens == 5
