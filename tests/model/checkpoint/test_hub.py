from pathlib import Path

import pytest
from huggingface_hub import constants

from model.checkpoint import CheckpointError, local_path, open_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty hub cache, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def _snapshot(cache: Path, revision: str) -> Path:
    repository = cache / "models--someone--some.llama-1"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / revision).write_text(COMMIT)
    return snapshot


def test_a_path_is_itself(tmp_path):
    assert local_path(str(tmp_path)) == tmp_path
    assert local_path(tmp_path) == tmp_path


@pytest.mark.parametrize(("revision", "address"), [("main", ""), ("v2", "@v2")])
def test_a_cached_repository_is_found_offline(cache, tiny_llama, revision, address):
    snapshot = _snapshot(cache, revision)
    tiny_llama().save_pretrained(snapshot)
    assert open_checkpoint(f"hf://someone/some.llama-1{address}").args.dim == 96


def test_what_is_not_cached_is_a_clear_error_offline(cache):
    with pytest.raises(
        CheckpointError, match="hf://someone/other is not in the local cache, and the hub is out of reach"
    ):
        local_path("hf://someone/other")


@pytest.mark.parametrize("location", ["hf://", "hf://name", "hf://a/b/c", "hf://a/b@", "hf://../b c"])
def test_malformed_addresses_are_refused(location):
    with pytest.raises(CheckpointError, match="not of the form hf://org/name"):
        local_path(location)
