"""Which tokenizer a location is taken for."""

from pathlib import Path

import pytest

from deployments.front.tokenizer import TokenizerError, open_tokenizer
from deployments.front.tokenizer.huggingface import HuggingFaceTokenizer
from deployments.front.tokenizer.sentencepiece import SentencePieceTokenizer
from deployments.front.tokenizer.tiktoken import TiktokenTokenizer


def test_kinds(sentencepiece_model: Path, smollm2_path: Path, llama_models: Path) -> None:
    assert isinstance(open_tokenizer(str(sentencepiece_model)), SentencePieceTokenizer)
    assert isinstance(open_tokenizer(str(sentencepiece_model.parent)), SentencePieceTokenizer)
    assert isinstance(open_tokenizer(str(smollm2_path)), HuggingFaceTokenizer)
    assert isinstance(open_tokenizer(str(smollm2_path.parent)), HuggingFaceTokenizer)
    assert isinstance(open_tokenizer(str(llama_models / "llama3" / "tokenizer.model")), TiktokenTokenizer)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"absent: no such file"):
        open_tokenizer(str(tmp_path / "absent"))
    with pytest.raises(TokenizerError, match=r"wants a tokenizer\.json.*none of them"):
        open_tokenizer(str(tmp_path))
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(TokenizerError, match="it has 2 GGUF files"):
        open_tokenizer(str(tmp_path))


def test_a_name_that_no_hub_can_have_is_refused() -> None:
    with pytest.raises(TokenizerError, match="hf://not a name"):
        open_tokenizer("hf://not a name")
