"""The official client, unchanged, against the app."""

import httpx
import openai
import pytest


@pytest.fixture
async def api(make_app):
    http = httpx.AsyncClient(transport=httpx.ASGITransport(app=make_app()))
    async with openai.AsyncOpenAI(
        api_key="none", base_url="http://front/v1", http_client=http, max_retries=0
    ) as client:
        yield client


MESSAGES = [{"role": "user", "content": "hi"}]


async def test_chat(api):
    answer = await api.chat.completions.create(
        model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=2, n=2, seed=1, temperature=0.3
    )
    assert [choice.message.content for choice in answer.choices] == ["Hello, world!"] * 2
    assert answer.choices[1].finish_reason == "stop"
    assert answer.choices[0].logprobs.content[0].top_logprobs[1].token == "x"
    assert answer.usage.prompt_tokens_details.cached_tokens == 4


async def test_chat_stream(api):
    stream = await api.chat.completions.create(
        model="tiny", messages=MESSAGES, stream=True, stop=["wor"], stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "Hello, "
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens == 10


async def test_stream_helper(api):
    async with api.chat.completions.stream(model="tiny", messages=MESSAGES) as stream:
        answer = await stream.get_final_completion()
    assert answer.choices[0].message.content == "Hello, world!"


async def test_completions(api):
    answer = await api.completions.create(
        model="tiny", prompt=["a", "b"], max_tokens=2, logprobs=1, echo=True, extra_body={"top_k": 5, "min_p": 0.1}
    )
    assert [choice.text for choice in answer.choices] == ["aHe", "bHe"]
    assert answer.choices[0].logprobs.tokens == ["a", "H", "e"]
    stream = await api.completions.create(model="tiny", prompt=[1, 2], max_tokens=4, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "Hell"


async def test_models(api):
    assert [model.id async for model in api.models.list()] == ["tiny"]
    assert (await api.models.retrieve("tiny")).id == "tiny"


async def test_errors_raise_what_the_client_knows(api, engine):
    with pytest.raises(openai.NotFoundError) as missing:
        await api.chat.completions.create(model="gpt", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        await api.chat.completions.create(model="tiny", messages=MESSAGES, temperature=9)
    assert refused.value.param == "temperature"
    engine.failure, engine.fails_after = RuntimeError(), 2
    with pytest.raises(openai.APIError):
        async for _ in await api.completions.create(model="tiny", prompt="a", stream=True):
            pass
