"""The official `openai` client, unchanged, against a running stack."""

import math

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

QUESTION = [{"role": "user", "content": "Name three colours."}]


@pytest.fixture
def client(stack: str) -> OpenAI:
    return OpenAI(base_url=f"{stack}/v1", api_key="unused", max_retries=0, timeout=120)


@pytest.fixture
def model(client: OpenAI) -> str:
    return client.models.list().data[0].id


def test_models_are_listed_and_found_one_by_one(client: OpenAI, model: str) -> None:
    assert client.models.retrieve(model).id == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no-such-model")


def test_chat(client: OpenAI, model: str) -> None:
    answer = client.chat.completions.create(model=model, messages=QUESTION, max_completion_tokens=12, temperature=0)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_says_what_the_plain_answer_says(client: OpenAI, model: str) -> None:
    request = {"model": model, "messages": QUESTION, "max_tokens": 24, "temperature": 0}
    plain = client.chat.completions.create(**request)
    chunks = list(client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == (
        plain.choices[0].message.content
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == plain.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage == plain.usage
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


async def test_async_streams_run_side_by_side(stack: str, model: str) -> None:
    async with AsyncOpenAI(base_url=f"{stack}/v1", api_key="unused", max_retries=0) as client:
        streams = [
            await client.completions.create(
                model=model,
                prompt=f"{number} plus one is",
                max_tokens=8,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
            for number in range(4)
        ]
        for stream in streams:
            *_, last = [chunk async for chunk in stream]
            assert last.usage is not None
            assert last.usage.completion_tokens == 8


def test_chat_logprobs_explain_the_text(client: OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=QUESTION, max_tokens=8, temperature=0, logprobs=True, top_logprobs=3
    )
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content or []
    assert len(content) == answer.usage.completion_tokens  # type: ignore[union-attr]
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.logprob <= 0
        assert token.logprob == pytest.approx(max(top.logprob for top in token.top_logprobs))
    said = b"".join(bytes(token.bytes or []) for token in content).decode()
    assert said.startswith(answer.choices[0].message.content or "")


def test_completion_logprobs_align_with_the_text(client: OpenAI, model: str) -> None:
    prompt = "The capital of France is"
    choice = client.completions.create(
        model=model, prompt=prompt, max_tokens=6, temperature=0, logprobs=2, echo=True
    ).choices[0]
    assert choice.text.startswith(prompt)
    assert choice.logprobs is not None
    tokens, offsets = choice.logprobs.tokens or [], choice.logprobs.text_offset or []
    assert "".join(tokens) == choice.text
    assert all(choice.text[offset:].startswith(token) for token, offset in zip(tokens, offsets, strict=True))
    values = choice.logprobs.token_logprobs or []
    assert values[0] is None
    assert all(-math.inf < value <= 0 for value in values[1:])


def test_n_choices_differ_when_sampled_and_repeat_with_the_seed(client: OpenAI, model: str) -> None:
    def ask(seed: int) -> list[str]:
        answer = client.completions.create(
            model=model, prompt="My favourite animal is", n=4, max_tokens=16, temperature=1.0, seed=seed
        )
        assert sorted(choice.index for choice in answer.choices) == [0, 1, 2, 3]
        return [choice.text for choice in sorted(answer.choices, key=lambda choice: choice.index)]

    first = ask(7)
    assert len(set(first)) > 1
    assert ask(7) == first
    assert ask(8) != first


def test_streamed_choices_carry_their_index(client: OpenAI, model: str) -> None:
    request = {"model": model, "prompt": "My favourite food is", "n": 2, "max_tokens": 12, "seed": 3}
    plain = {choice.index: choice.text for choice in client.completions.create(**request).choices}
    streamed = {0: "", 1: ""}
    for chunk in client.completions.create(**request, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == plain


@pytest.mark.parametrize("stream", [False, True])
def test_stop_ends_before_the_string(client: OpenAI, model: str, stream: bool) -> None:
    request = {
        "model": model,
        "prompt": "1, 2, 3, 4, 5, 6,",
        "max_tokens": 40,
        "temperature": 0,
        "stop": [" 9,", "zzz"],
    }
    answer = client.completions.create(**request, stream=stream)
    chunks = list(answer) if stream else [answer]
    text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert text == " 7, 8,"
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_token_ids_are_taken_as_a_prompt(client: OpenAI, model: str) -> None:
    text = client.completions.create(model=model, prompt="Hello world", max_tokens=5, temperature=0)
    ids = client.post("/../tokenize", body={"model": model, "prompt": "Hello world"}, cast_to=dict)["tokens"]
    assert client.completions.create(model=model, prompt=ids, max_tokens=5, temperature=0).choices[0].text == (
        text.choices[0].text
    )


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1},
        {"top_p": 0},
        {"n": 0},
        {"max_tokens": 10**7},
        {"logit_bias": {"1": 1000}},
        {"extra_body": {"no_such_field": 1}},
        {"messages": []},
    ],
    ids=lambda bad: next(iter(bad)),
)
def test_a_bad_request_raises_its_class_and_names_the_field(client: OpenAI, model: str, bad: dict[str, object]) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(**({"model": model, "messages": QUESTION} | bad))
    field = "no_such_field" if "extra_body" in bad else next(iter(bad))
    assert field == raised.value.param or field in raised.value.message
    assert raised.value.type


def test_an_unknown_model_raises_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="no-such-model", messages=QUESTION)


def test_a_prompt_longer_than_the_context_says_both_numbers(client: OpenAI, model: str) -> None:
    limit = client.models.retrieve(model).model_extra["max_model_len"]  # type: ignore[index]
    with pytest.raises(openai.BadRequestError, match=str(limit)) as raised:
        client.completions.create(model=model, prompt=[1] * (limit + 5), max_tokens=4)
    assert str(limit + 5) in raised.value.message
