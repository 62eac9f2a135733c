import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import LLM, TransformerInput
from model.checkpoint import CheckpointError, open_checkpoint

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def _edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 12},
        {"head_dim": 16},
        {"rope_parameters": LLAMA3_ROPE},
        {"rms_norm_eps": 1e-2, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    ],
    ids=["gqa", "tied", "mha", "wide heads", "scaled rope", "eps and theta"],
)
@pytest.mark.parametrize("max_shard_size", ["1GB", "40KB"], ids=["one file", "index"])
def test_the_model_computes_what_transformers_does(tmp_path, tiny_llama, settings, max_shard_size):
    reference = tiny_llama(**settings)
    reference.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_size == "40KB")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.args.max_seq_len == 128
    model = LLM(checkpoint.args, initialize=False)
    checkpoint.load_into(model)
    tokens = torch.randint(0, 120, (2, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(tokens).logits
        assert torch.allclose(model(TransformerInput(tokens)).logits, expected, atol=1e-5)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_together_hold_every_tensor(tmp_path, tiny_llama, load, reassemble, world_size):
    tiny_llama(num_key_value_heads=12).save_pretrained(tmp_path, max_shard_size="40KB")
    checkpoint = open_checkpoint(tmp_path)
    whole, joined = load(checkpoint), reassemble(checkpoint, world_size)
    assert whole.keys() == joined.keys()
    for name, tensor in whole.items():
        assert tensor.isfinite().all()
        assert torch.equal(joined[name], tensor)


def test_the_rope_settings_of_older_transformers(tmp_path, tiny_llama):
    tiny_llama().save_pretrained(tmp_path)
    scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    _edit_config(tmp_path, rope_parameters=..., rope_theta=12345.0, rope_scaling=scaling)
    args = open_checkpoint(tmp_path).args
    assert args.rope_theta == 12345.0
    assert args.use_scaled_rope
    assert (args.rope_scaling_factor, args.rope_original_max_len) == (8.0, 32)
    assert (args.rope_low_freq_factor, args.rope_high_freq_factor) == (1.0, 4.0)
    _edit_config(tmp_path, rope_scaling=None)
    assert not open_checkpoint(tmp_path).args.use_scaled_rope


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"architectures": ["Qwen2ForCausalLM"]}, "Qwen2ForCausalLM is not supported, only LlamaForCausalLM"),
        ({"model_type": "mistral"}, "model_type = 'mistral'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"sliding_window": 4096}, "sliding_window = 4096"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config = {'quant_method': 'awq'}"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope scaling 'yarn'"),
        ({"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope scaling 'linear'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "has no factor"),
        ({"hidden_size": ...}, "has no hidden_size"),
        ({"num_attention_heads": 5, "head_dim": None}, "n_heads (5) must be a multiple of n_kv_heads (4)"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, tiny_llama, changes, culprit):
    tiny_llama().save_pretrained(tmp_path)
    _edit_config(tmp_path, **changes)
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(tmp_path)
    assert culprit in str(raised.value)
    assert "config.json" in str(raised.value)


def _edit_weights(folder, change):
    path = folder / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(weights)
    save_file(weights, path)


def test_extra_and_missing_tensors_are_named(tmp_path, tiny_llama):
    tiny_llama().save_pretrained(tmp_path)

    def change(weights):
        del weights["model.layers.1.mlp.up_proj.weight"]
        weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(96)
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)  # derived, in old files

    _edit_weights(tmp_path, change)
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError) as raised:
        checkpoint.load_into(LLM(checkpoint.args))
    assert "1 missing: layers.1.feed_forward.w3.weight; 1 extra: model.layers.0.self_attn.q_proj.bias" in str(
        raised.value
    )
    assert "inv_freq" not in str(raised.value)


def test_quantized_tensors_are_refused(tmp_path, tiny_llama):
    tiny_llama().save_pretrained(tmp_path)
    _edit_weights(tmp_path, lambda weights: weights.update({"lm_head.weight": torch.zeros(120, 96, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight \(torch\.int8\)"):
        open_checkpoint(tmp_path)


def test_a_tied_model_ignores_the_copy_that_some_files_hold(tmp_path, tiny_llama):
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    _edit_weights(tmp_path, lambda weights: weights.update({"lm_head.weight": torch.zeros(120, 96)}))
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.load_into(LLM(checkpoint.args))


def test_a_missing_file_of_the_index_is_named(tmp_path, tiny_llama):
    tiny_llama().save_pretrained(tmp_path, max_shard_size="40KB")
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=gone.name):
        open_checkpoint(tmp_path)


def test_a_damaged_file_is_named(tmp_path, tiny_llama):
    tiny_llama().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        open_checkpoint(tmp_path)
