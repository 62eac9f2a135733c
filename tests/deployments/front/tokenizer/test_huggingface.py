"""`tokenizer.json` against the `tokenizers` library, and the settings beside it."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models

from deployments.front.tokenizer import TokenizerError, open_tokenizer


def test_encodes_and_decodes_as_the_library_does(
    huggingface_backend: tokenizers.Tokenizer, tmp_path: Path, texts: list[str]
) -> None:
    huggingface_backend.save(str(tmp_path / "tokenizer.json"))
    ours = open_tokenizer(str(tmp_path))
    for text in [*texts, "<s>the </s> dog", "the <think> dog"]:
        ids = huggingface_backend.encode(text).ids
        assert ours.encode(text) == ids
        for skip in (True, False):
            expected = huggingface_backend.decode(ids, skip_special_tokens=skip)
            assert ours.decode(ids, skip_special_tokens=skip) == expected


def test_an_added_token_decodes_to_its_text(tmp_path: Path, byte_level: tokenizers.Tokenizer) -> None:
    """`tokenizers` 0.23 reads the letters of "größer" as GPT-2's spelling of bytes and decodes garbage."""
    byte_level.add_tokens(["größer"])
    ours = open_tokenizer(_folder(tmp_path, byte_level))
    ids = ours.encode("a größer dog")
    assert byte_level.token_to_id("größer") in ids
    assert ours.decode(ids) == "a größer dog"


def _folder(folder: Path, backend: tokenizers.Tokenizer, **files: Any) -> str:
    backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return str(folder)


@pytest.fixture
def backend() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "Ġ": 7}, merges=[]))
    backend.add_special_tokens(["<s>", "</s>", "<|eot|>"])
    backend.decoder = decoders.ByteLevel()
    return backend


def test_settings(tmp_path: Path, backend: tokenizers.Tokenizer) -> None:
    ids = {token: backend.token_to_id(token) for token in ("<s>", "</s>", "<|eot|>")}
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None, "chat_template": "old"}
    generation = {"eos_token_id": [ids["</s>"], ids["<|eot|>"]]}
    folder = _folder(tmp_path, backend, tokenizer_config=config, generation_config=generation)
    ours = open_tokenizer(folder)
    assert ours.bos_token_id == ids["<s>"]
    assert ours.eos_token_ids == (ids["</s>"], ids["<|eot|>"])
    assert ours.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert ours.special_ids == frozenset(ids.values())
    assert ours.chat_template == "old"
    (tmp_path / "chat_template.jinja").write_text("new")
    assert open_tokenizer(folder).chat_template == "new"


def test_holes_in_the_vocabulary_are_nothing(tmp_path: Path, backend: tokenizers.Tokenizer) -> None:
    ours = open_tokenizer(_folder(tmp_path, backend))
    hole = next(i for i in range(ours.vocab_size) if backend.id_to_token(i) is None)
    assert ours.token_bytes(hole) == b""
    assert ours.token_bytes(7) == b" "


def test_end_tokens_come_from_config_json_without_a_generation_config(
    tmp_path: Path, backend: tokenizers.Tokenizer
) -> None:
    assert open_tokenizer(_folder(tmp_path, backend, config={"eos_token_id": 1})).eos_token_ids == (1,)


def test_of_several_chat_templates_the_default_is_taken(tmp_path: Path, backend: tokenizers.Tokenizer) -> None:
    templates = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    ours = open_tokenizer(_folder(tmp_path, backend, tokenizer_config={"chat_template": templates}))
    assert ours.chat_template == "d"


def test_padding_and_truncation_of_the_file_are_off(tmp_path: Path, backend: tokenizers.Tokenizer) -> None:
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    assert open_tokenizer(_folder(tmp_path, backend)).encode("abab") == [0, 1, 0, 1]


def test_a_decoder_that_is_not_exact_is_refused(tmp_path: Path, backend: tokenizers.Tokenizer) -> None:
    backend.decoder = decoders.WordPiece()
    with pytest.raises(TokenizerError, match="WordPiece"):
        open_tokenizer(_folder(tmp_path, backend))


def test_broken_files_are_named(tmp_path: Path, backend: tokenizers.Tokenizer) -> None:
    folder = _folder(tmp_path, backend)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json"):
        open_tokenizer(folder)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        open_tokenizer(folder)
