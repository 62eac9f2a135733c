"""A SentencePiece model against the library's own encoding and decoding."""

import json
from pathlib import Path

import pytest
import sentencepiece

from deployments.front.tokenizer import TokenizerError, open_tokenizer


def test_encodes_and_decodes_as_the_library_does(sentencepiece_model: Path, texts: list[str]) -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    ours = open_tokenizer(str(sentencepiece_model))
    for text in texts:
        ids = theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False) == ids
        assert ours.encode(text) == [theirs.bos_id(), *ids]
        assert ours.decode(ids) == theirs.decode(ids)


def test_facts(sentencepiece_model: Path) -> None:
    ours = open_tokenizer(str(sentencepiece_model))
    assert (ours.bos_token_id, ours.eos_token_ids, ours.special_ids) == (1, (2,), {0, 1, 2})
    assert ours.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert ours.chat_template is None


def test_the_leading_space_is_dropped_only_at_the_start_of_a_text(sentencepiece_model: Path) -> None:
    ours = open_tokenizer(str(sentencepiece_model))
    ids = ours.encode("the dog", add_special_tokens=False)
    assert ours.token_text(ids[0]).startswith(" ")
    assert ours.decode(ids) == "the dog"
    assert ours.decode(ids, continues=True) == " the dog"
    assert ours.decode([1, *ids]) == "the dog"


def test_special_tokens_in_text(sentencepiece_model: Path) -> None:
    ours = open_tokenizer(str(sentencepiece_model))
    words = [ours.encode(word, add_special_tokens=False) for word in ("the", "dog")]
    assert ours.encode("<s>the</s>dog", add_special_tokens=False) == [1, *words[0], 2, *words[1]]


def test_settings_beside_the_model(sentencepiece_model: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model.read_bytes())
    config = {
        "eos_token": {"content": "<|im_end|>"},
        "chat_template": "{{ messages }}",
        "added_tokens_decoder": {
            "500": {"content": "<|im_end|>", "special": True},
            "501": {"content": "<think>", "special": False},
        },
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [500, 2]}))
    ours = open_tokenizer(str(tmp_path))
    assert (ours.eos_token_ids, ours.vocab_size, ours.chat_template) == ((500, 2), 502, "{{ messages }}")
    ids = ours.encode("<think>the<|im_end|>", add_special_tokens=False)
    assert (ids[0], ids[-1]) == (501, 500)
    assert ours.decode(ids) == "<think> the"
    assert 501 in ours.encode("<think>", parse_special=False)


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x00\x01 nothing of the kind")
    with pytest.raises(TokenizerError, match="not a SentencePiece model"):
        open_tokenizer(str(tmp_path))
