import json

import pytest
import torch

from model import LLM
from model.args import ModelArgs
from model.checkpoint import CheckpointError, open_checkpoint
from model.checkpoint.slices import split_dim

PARAMS = {"dim": 96, "n_layers": 2, "n_heads": 12, "n_kv_heads": 12, "vocab_size": 120, "multiple_of": 48}
PARAMS |= {"norm_eps": 1e-5, "rope_theta": 500000.0}
ARGS = ModelArgs(**PARAMS)


def _write(folder, weights, num_shards=1, embedding_dim=0, **params):
    """Shards as Meta's training ranks write them: each its slice of split tensors, all of the others."""
    for shard in range(num_shards):
        part = {"rope.freqs": torch.zeros(4)}
        for name, tensor in weights.items():
            dim = embedding_dim if name == "tok_embeddings.weight" else split_dim(name)
            part[name] = tensor if dim is None else tensor.chunk(num_shards, dim)[shard].clone()
        torch.save(part, folder / f"consolidated.{shard:02d}.pth")
    content = {key: value for key, value in (PARAMS | params).items() if value is not ...}
    (folder / "params.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("num_shards", [1, 2, 4])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_any_number_of_files_serves_any_number_of_ranks(tmp_path, meta_weights, reassemble, num_shards, world_size):
    weights = meta_weights(ARGS)
    whole = reassemble(open_checkpoint(_write(tmp_path, weights, num_shards)), world_size)
    assert whole.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(whole[name], tensor), name


@pytest.mark.parametrize("num_shards", [1, 2])
def test_llama_2_splits_the_embedding_by_columns_and_leaves_settings_out(tmp_path, meta_weights, load, num_shards):
    weights = meta_weights(ARGS)
    folder = _write(tmp_path, weights, num_shards, embedding_dim=1, vocab_size=-1, rope_theta=...)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.args.vocab_size == 120
    assert checkpoint.args.rope_theta == 10000.0
    assert checkpoint.args.max_seq_len == 4096
    assert torch.equal(load(checkpoint)["tok_embeddings.weight"], weights["tok_embeddings.weight"])


@pytest.mark.parametrize("vocab_size", [-1, ...])
def test_the_vocabulary_is_counted_where_it_is_not_given(tmp_path, meta_weights, vocab_size):
    folder = _write(tmp_path, meta_weights(ARGS), 2, vocab_size=vocab_size)
    assert open_checkpoint(folder).args.vocab_size == 120


def test_llama_3_1_scales_its_rotations_as_its_code_does(tmp_path, meta_weights):
    args = open_checkpoint(_write(tmp_path, meta_weights(ARGS), use_scaled_rope=True)).args
    assert args.max_seq_len == 131072
    scaling = (args.rope_scaling_factor, args.rope_low_freq_factor, args.rope_high_freq_factor)
    assert scaling == (8.0, 1.0, 4.0)
    args = open_checkpoint(_write(tmp_path, meta_weights(ARGS), use_scaled_rope=True, rope_scaling_factor=2.0)).args
    assert args.rope_scaling_factor == 2.0


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_is_filled(tmp_path, meta_weights, tied):
    weights = meta_weights(ARGS.model_copy(update={"tie_word_embeddings": tied}))
    checkpoint = open_checkpoint(_write(tmp_path, weights, 4))
    assert checkpoint.args.tie_word_embeddings == tied
    model = LLM(checkpoint.args, initialize=False)
    checkpoint.load_into(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name])


@pytest.mark.parametrize("key", ["vision_chunk_size", "quantization_args", "lora_args"])
def test_keys_of_other_models_are_refused_by_name(tmp_path, meta_weights, key):
    with pytest.raises(CheckpointError, match=f"not supported: {key}"):
        open_checkpoint(_write(tmp_path, meta_weights(ARGS), **{key: {}}))


def test_faults_of_files_are_named(tmp_path, meta_weights):
    weights = meta_weights(ARGS)
    _write(tmp_path, weights, 4)
    (tmp_path / "consolidated.01.pth").unlink()
    with pytest.raises(CheckpointError, match="lacks consolidated files number 1"):
        open_checkpoint(tmp_path)

    _write(tmp_path, weights, 4)
    torch.save({"norm.weight": weights["norm.weight"]}, tmp_path / "consolidated.02.pth")
    with pytest.raises(CheckpointError, match=r"in some of its files, but not in all: .*w1"):
        open_checkpoint(tmp_path)

    (tmp_path / "consolidated.02.pth").write_bytes(b"not a zip")
    with pytest.raises(CheckpointError, match=r"consolidated\.02\.pth cannot be read"):
        open_checkpoint(tmp_path)

    for path in tmp_path.glob("*.pth"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"no consolidated\.\*\.pth"):
        open_checkpoint(tmp_path)


def test_a_lost_last_shard_shows_as_misshaped_tensors(tmp_path, meta_weights):
    _write(tmp_path, meta_weights(ARGS), 4)
    (tmp_path / "consolidated.03.pth").unlink()
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"mis-shaped: .*wq\.weight \(\[72, 96\]; the model has \[96, 96\]\)"):
        checkpoint.load_into(LLM(checkpoint.args))


def test_code_in_a_file_is_not_run(tmp_path, meta_weights):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    _write(tmp_path, meta_weights(ARGS))
    torch.save({"norm.weight": Evil()}, tmp_path / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "pwned").exists()
