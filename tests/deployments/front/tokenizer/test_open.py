"""Which tokenizer a location is taken for."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

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


def test_a_repository_in_the_hubs_cache_is_opened(sentencepiece_model: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--someone--small" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "v2").write_text(commit)
    shutil.copy(sentencepiece_model, snapshot / "tokenizer.model")
    assert isinstance(open_tokenizer("hf://someone/small@v2"), SentencePieceTokenizer)
    with pytest.raises(TokenizerError, match="not in the local cache"):
        open_tokenizer("hf://someone/other")


def test_no_torch_is_imported() -> None:
    """A second and hundreds of megabytes that a front has no use for."""
    check = "import sys, deployments.front.tokenizer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
