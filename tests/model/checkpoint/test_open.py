import json

import pytest

from model.checkpoint import CheckpointError, open_checkpoint


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere does not exist"):
        open_checkpoint(tmp_path / "nowhere")


def test_a_folder_of_something_else_lists_what_is_known_and_what_is_there(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"Known are .*safetensors.*It holds: config\.json, pytorch_model\.bin"):
        open_checkpoint(tmp_path)


def test_a_file_of_something_else(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\x08\x00")
    with pytest.raises(CheckpointError, match="not a GGUF file; of the other formats, give the folder"):
        open_checkpoint(path)


def test_settings_that_are_not_json(tmp_path):
    (tmp_path / "model.safetensors").touch()
    for content in ("{", json.dumps([1])):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            open_checkpoint(tmp_path)


def test_the_one_gguf_file_of_a_folder(tmp_path, smollm2):
    (tmp_path / "a.gguf").symlink_to(smollm2)
    assert open_checkpoint(tmp_path).args.dim == 576
    (tmp_path / "b.gguf").symlink_to(smollm2)
    with pytest.raises(CheckpointError, match=r"several GGUF files, give one: a\.gguf, b\.gguf"):
        open_checkpoint(str(tmp_path))
