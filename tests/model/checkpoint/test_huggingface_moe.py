"""Llama 4 and Mixtral as `transformers` saves them: our logits against its own, on configurations drawn at random."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Llama4ForCausalLM, Llama4TextConfig, MixtralConfig, MixtralForCausalLM

from model import LLM, TransformerInput
from model.checkpoint import CheckpointError, open_checkpoint
from tests.model.checkpoint.random_weights import randomized

LENGTH = 24


def _shape(rng):
    head_dim, heads = rng.choice([8, 12, 16]), rng.choice([2, 4, 6])
    return {
        "hidden_size": rng.choice([32, 48]),
        "intermediate_size": rng.choice([24, 40]),
        "num_hidden_layers": rng.choice([1, 2, 4]),
        "num_attention_heads": heads,
        "num_key_value_heads": rng.choice([n for n in (1, 2, heads) if heads % n == 0]),
        "head_dim": head_dim,
        "vocab_size": 96,
        "max_position_embeddings": 64,
        "num_local_experts": rng.choice([2, 4, 8]),
        "num_experts_per_tok": rng.choice([1, 2]),
        "rms_norm_eps": rng.choice([1e-5, 1e-3]),
        "tie_word_embeddings": rng.random() < 0.3,
        "pad_token_id": None,
    }


def _rope(rng):
    if rng.random() < 0.5:
        return {"rope_type": "default", "rope_theta": rng.choice([1e4, 5e5])}
    scaling = {"factor": rng.choice([8.0, 16.0]), "low_freq_factor": 1.0, "high_freq_factor": rng.choice([2.0, 4.0])}
    return scaling | {"rope_type": "llama3", "rope_theta": 1e4, "original_max_position_embeddings": 32}


def llama4(seed):
    rng = random.Random(seed)
    shape = _shape(rng)
    layers = shape["num_hidden_layers"]
    nope = rng.choice([None, [1] * layers, [int((layer + 1) % 2 != 0) for layer in range(layers)]])
    step = rng.choice([1, 2])
    config = Llama4TextConfig(
        **shape,
        intermediate_size_mlp=rng.choice([24, 56]),
        rope_parameters=_rope(rng),
        no_rope_layers=nope,
        attention_chunk_size=rng.choice([4, 8, 64]),
        layer_types=rng.choice([None, ["full_attention"] * layers]),
        use_qk_norm=rng.random() < 0.5,
        attn_temperature_tuning=rng.random() < 0.5,
        floor_scale=rng.choice([4, 8192]),
        attn_scale=rng.choice([0.1, 0.5]),
        moe_layers=rng.choice([None, list(range(step - 1, layers, step)), []]),
        interleave_moe_layer_step=step,
    )
    return Llama4ForCausalLM(config)


def mixtral(seed):
    rng = random.Random(seed)
    return MixtralForCausalLM(MixtralConfig(**_shape(rng), rope_parameters=_rope(rng)))


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("build", [llama4, mixtral])
def test_logits_equal_those_of_transformers(tmp_path, build, seed):
    theirs = randomized(build(seed), seed)
    theirs.save_pretrained(tmp_path, max_shard_size="40KB" if seed % 2 else "1GB")
    checkpoint = open_checkpoint(tmp_path)
    model = LLM(checkpoint.args, initialize=False)
    checkpoint.load_into(model)
    tokens = torch.randint(0, 96, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        expected = theirs(tokens).logits
        got = model(TransformerInput(tokens)).logits
    scale = expected.abs().max()
    message = f"seed {seed}: {checkpoint.args!r}"
    torch.testing.assert_close(got / scale, expected / scale, rtol=1e-5, atol=1e-5, msg=lambda m: f"{message}\n{m}")


@pytest.mark.parametrize("which", ["llama4_folder", "mixtral_folder"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_together_hold_every_tensor(request, which, world_size, load, reassemble):
    checkpoint = open_checkpoint(request.getfixturevalue(which))
    whole, joined = load(checkpoint), reassemble(checkpoint, world_size)
    assert whole.keys() == joined.keys()
    for name, tensor in whole.items():
        assert tensor.isfinite().all()
        assert torch.equal(joined[name], tensor), name


@pytest.mark.parametrize("which", ["llama4_folder", "mixtral_folder"])
def test_a_size_that_does_not_divide_is_refused_with_those_that_do(request, which):
    checkpoint = open_checkpoint(request.getfixturevalue(which))
    with pytest.raises(CheckpointError, match=r"size of 3 does not divide n_heads \(4\), .*these sizes do: 1, 2, 4"):
        checkpoint.load_into(LLM(checkpoint.args), 0, 3)


def _edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"no_rope_layers": [0, 1]}, "no_rope_layers that are not at one interval (layers [0])"),
        ({"moe_layers": [0]}, "moe_layers that are not at one interval (layers [0])"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layer_types other than"),
        ({"num_local_experts": None}, "has no num_local_experts"),
        ({"num_experts_per_tok": 9}, "top_k (9) must not be above num_experts (4)"),
        ({"model_type": "llama"}, "model_type = 'llama'"),
        ({"attention_bias": True}, "attention_bias = True"),
    ],
)
def test_what_is_not_supported_is_named(llama4_folder, changes, culprit):
    _edit_config(llama4_folder, **changes)
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(llama4_folder)
    assert culprit in str(raised.value)


def test_settings_of_older_transformers(llama4_folder):
    rope = {"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0}
    rope |= {"original_max_position_embeddings": 8192}
    older = {"no_rope_layers": [], "attn_temperature_tuning": 4, "rope_scaling": rope, "rope_parameters": None}
    _edit_config(llama4_folder, **older, rope_theta=1234.0, layer_types=None, moe_layers=None, num_hidden_layers=4)
    args = open_checkpoint(llama4_folder).args
    assert (args.nope_layer_interval, args.attention_chunk_size) == (4, 8192)
    assert args.moe_args.interleave_moe_layer_step == 2
    assert args.attn_temperature_tuning is True
    assert (args.rope_theta, args.rope_scaling_factor, args.rope_high_freq_factor) == (1234.0, 16.0, 1.0)


def _edit_weights(folder, change):
    path = folder / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(weights)
    save_file(weights, path)


EXPERTS = "model.layers.1.feed_forward.experts."
SINGLE = "model.layers.1.block_sparse_moe.experts.2.w1.weight"


@pytest.mark.parametrize(
    ("which", "change", "culprit"),
    [
        (
            "llama4_folder",
            lambda w: w.pop(EXPERTS + "gate_up_proj"),
            r"2 missing: layers\.1\..*experts\.w1, .*experts\.w3",
        ),
        ("llama4_folder", lambda w: w.pop(EXPERTS + "down_proj"), r"1 missing: layers\.1\.feed_forward\.experts\.w2"),
        ("llama4_folder", lambda w: w.update({EXPERTS + "bias": torch.zeros(4)}), r"1 extra: model\..*experts\.bias"),
        (
            "llama4_folder",
            lambda w: w.update({EXPERTS + "down_proj": w[EXPERTS + "down_proj"].mT.contiguous()}),
            r"1 mis-shaped: layers\.1\.feed_forward\.experts\.w2 \(\[4, 32, 24\]; the model has \[4, 24, 32\]\)",
        ),
        (
            "llama4_folder",
            lambda w: w.update({EXPERTS + "gate_up_proj": w[EXPERTS + "gate_up_proj"].mT.contiguous()}),
            r"mis-shaped: layers\.1\.feed_forward\.experts\.w1",
        ),
        (
            "llama4_folder",
            lambda w: w.update({EXPERTS + "gate_up_proj": torch.zeros(4, 32)}),
            r"extra: model\..*experts\.gate_up_proj",
        ),
        ("mixtral_folder", lambda w: w.pop(SINGLE), r"missing: .*layers\.1\..*w1\.weight .* expert 2"),
        (
            "mixtral_folder",
            lambda w: w.update({SINGLE.replace("2", "4"): w[SINGLE].clone()}),
            r"extra: model\.layers\.1.*\.4\.w1",
        ),
        ("mixtral_folder", lambda w: w.update({SINGLE: w[SINGLE].T.contiguous()}), r"mis-shaped: .*experts\.2\.w1"),
    ],
)
def test_a_corrupted_file_is_refused_with_the_name(request, which, change, culprit):
    folder = request.getfixturevalue(which)
    _edit_weights(folder, change)
    with pytest.raises(CheckpointError, match=culprit):
        _load(folder)


def _load(folder):
    checkpoint = open_checkpoint(folder)
    checkpoint.load_into(LLM(checkpoint.args))
