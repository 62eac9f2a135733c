"""Meta's Llama 3 and Llama 4 files against Meta's own code."""

import importlib
import random
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deployments.front.chat_template import ChatTemplate, ChatTemplateError
from deployments.front.tokenizer import Tokenizer, TokenizerError, open_tokenizer


@pytest.fixture(scope="module", params=["llama3", "llama4"])
def pair(request: pytest.FixtureRequest, llama_models: Path) -> tuple[Tokenizer, Any]:
    theirs = importlib.import_module(f"llama_models.{request.param}.tokenizer").Tokenizer
    path = llama_models / request.param / "tokenizer.model"
    return open_tokenizer(str(path)), theirs(path)


def test_encodes_and_decodes_as_meta_does(pair: tuple[Tokenizer, Any], texts: list[str]) -> None:
    ours, theirs = pair
    special = "<|begin_of_text|>x<|eot_id|><|eot|>y <|image|><|no_such_token|><|<|eom|>|>"
    for text in [*texts, special]:
        ids = theirs.encode(text, bos=True, eos=False, allowed_special="all")
        assert ours.encode(text) == ids
        assert ours.encode(text, parse_special=False) == theirs.encode(text, bos=True, eos=False)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n019'sSl<|>")), max_size=60))
def test_encodes_any_text_as_meta_does(pair: tuple[Tokenizer, Any], text: str) -> None:
    ours, theirs = pair
    assert ours.encode(text) == theirs.encode(text, bos=True, eos=False, allowed_special="all")


def test_any_tokens_decode_as_meta_does(pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    ids = random.Random(1).choices(range(ours.vocab_size), k=5000)
    assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)


def test_special_tokens_are_metas(pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    assert {ours.token_text(i): i for i in ours.special_ids} == theirs.special_tokens
    assert (ours.vocab_size, ours.bos_token_id) == (theirs.n_words, theirs.bos_id)
    assert ours.eos_token_ids == tuple(theirs.stop_tokens)


@pytest.mark.parametrize("long", ["a" * 60_001, " " * 60_001, "ab " * 20_000 + "\n" * 30_000 + "x"])
def test_long_runs_are_encoded_as_meta_does(pair: tuple[Tokenizer, Any], long: str) -> None:
    ours, theirs = pair
    assert ours.encode(long) == theirs.encode(long, bos=True, eos=False)


def test_runs_just_short_of_the_limit_take_linear_time(pair: tuple[Tokenizer, Any]) -> None:
    ours, _ = pair
    text = ("ab" * 12_000 + " ") * 16
    start = time.process_time()
    ours.encode(text)
    assert time.process_time() - start < 5


def test_text_longer_than_one_call_of_meta_keeps_its_special_tokens(pair: tuple[Tokenizer, Any]) -> None:
    """Meta's code cuts at 400,000 characters, through whatever is there; ours must not cut a special token."""
    ours, _ = pair
    text = "ab " * 133_331 + "<|begin_of_text|>" + "cd " * 10
    assert ours.bos_token_id in ours.encode(text, add_special_tokens=False)
    assert ours.decode(ours.encode(text), skip_special_tokens=False) == "<|begin_of_text|>" + text


def test_the_chat_template_writes_what_metas_chat_format_writes(llama_models: Path) -> None:
    from llama_models.datatypes import RawMessage
    from llama_models.llama3.chat_format import ChatFormat
    from llama_models.llama3.tokenizer import Tokenizer as Theirs

    path = llama_models / "llama3" / "tokenizer.model"
    ours = open_tokenizer(str(path))
    dialogue = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 2+2?\n\nThink  twice."},
        {"role": "assistant", "content": "4"},
        {"role": "tool", "content": "12:00"},
        {"role": "user", "content": "Why? 😀"},
    ]
    template = ChatTemplate(ours.chat_template or "", ours.special_tokens)
    raw = [RawMessage(role=m["role"], content=m["content"], call_id="1", tool_name="x") for m in dialogue]
    expected = ChatFormat(Theirs(path)).encode_dialog_prompt(raw).tokens
    assert ours.encode(template.render(dialogue), add_special_tokens=False) == expected


def test_the_llama4_chat_template(llama_models: Path) -> None:
    """Meta's module for it needs torchvision, so the text is written out here."""
    ours = open_tokenizer(str(llama_models / "llama4" / "tokenizer.model"))
    template = ChatTemplate(ours.chat_template or "", ours.special_tokens)
    dialogue = [{"role": "user", "content": " Hi\n"}, {"role": "tool", "content": "1"}]
    assert template.render(dialogue) == (
        "<|begin_of_text|><|header_start|>user<|header_end|>\n\nHi<|eot|>"
        "<|header_start|>ipython<|header_end|>\n\n1<|eom|><|header_start|>assistant<|header_end|>\n\n"
    )


def test_the_chat_templates_refuse_what_they_cannot_write(llama_models: Path) -> None:
    ours = open_tokenizer(str(llama_models / "llama3" / "tokenizer.model"))
    template = ChatTemplate(ours.chat_template or "", ours.special_tokens)
    with pytest.raises(ChatTemplateError, match="content must be text"):
        template.render([{"role": "assistant", "content": None}])
    with pytest.raises(ChatTemplateError, match="no chat template for tools"):
        template.render([{"role": "user", "content": "Hi"}], tools=[{"type": "function"}])


def test_files_of_another_size_are_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(TokenizerError, match="2 tokens; Llama 3 has 128000"):
        open_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 2\n")
    with pytest.raises(TokenizerError, match="each once"):
        open_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg==\n")
    with pytest.raises(TokenizerError, match="line 2"):
        open_tokenizer(str(tmp_path))
