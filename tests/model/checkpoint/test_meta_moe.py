"""Llama 4 as Meta publishes it: experts split on the hidden dimension, names old and new, in any number of files."""

import json

import pytest
import torch

from model import LLM, ModelArgs, TransformerInput
from model.checkpoint import CheckpointError, open_checkpoint
from model.checkpoint.slices import rank_region
from tests.model.old_names import NAMINGS

PARAMS = {
    "dim": 32, "n_layers": 4, "n_heads": 4, "n_kv_heads": 4, "vocab_size": 64, "multiple_of": 16, "ffn_exp": 4.0,
    "ffn_dim_multiplier": 1.2, "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True,
    "nope_layer_interval": 4, "attention_chunk_size": 8, "use_qk_norm": True, "attn_temperature_tuning": True,
    "moe_args": {"num_experts": 4, "top_k": 1, "capacity_factor": 1.0, "interleave_moe_layer_step": 2},
}  # fmt: skip
TOKENS = torch.arange(40).reshape(2, 20) % 64


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(2)
    model = LLM(ModelArgs(**PARAMS, max_seq_len=64))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(std=0.3)
    return model


def _write(folder, state, num_files, naming=lambda state: state, **params):
    """Each file is a rank's slice, renamed: what is fused in it is the rank's own."""
    for rank in range(num_files):
        part = {name: tensor[rank_region(name, tensor.shape, rank, num_files)] for name, tensor in state.items()}
        torch.save({k: _own(v) for k, v in naming(part).items()}, folder / f"consolidated.{rank:02d}.pth")
    (folder / "params.json").write_text(json.dumps(PARAMS | {"max_seq_len": 64} | params))
    return folder


def _own(value):
    return value.clone() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("num_files", [1, 2, 4])
@pytest.mark.parametrize("naming", ["today", *NAMINGS])
def test_every_naming_in_any_number_of_files_is_the_same_model(tmp_path, model, naming, num_files):
    folder = _write(tmp_path, model.state_dict(), num_files, NAMINGS.get(naming, dict))
    checkpoint = open_checkpoint(folder)
    other = LLM(checkpoint.args, initialize=False)
    checkpoint.load_into(other)
    expected = model(TransformerInput(TOKENS)).logits
    torch.testing.assert_close(other(TransformerInput(TOKENS)).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("num_files", [1, 2, 4])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_any_number_of_files_serves_any_number_of_ranks(tmp_path, model, reassemble, num_files, world_size):
    state = model.state_dict()
    whole = reassemble(open_checkpoint(_write(tmp_path, state, num_files, NAMINGS["all at once"])), world_size)
    assert whole.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(whole[name], tensor), name


def test_a_size_that_does_not_divide_is_refused_with_those_that_do(tmp_path, model):
    checkpoint = open_checkpoint(_write(tmp_path, model.state_dict(), 2))
    with pytest.raises(CheckpointError, match=r"size of 3 does not divide .*n_heads \(4\).*these sizes do: 1, 2, 4"):
        checkpoint.load_into(model, 0, 3)


def test_the_settings_of_llama_4(tmp_path, model):
    nothing = {"quantization_args": None, "lora_args": None, "vision_args": None, "max_batch_size": 4}
    args = open_checkpoint(_write(tmp_path, model.state_dict(), 1, max_seq_len=None, **nothing)).args
    assert args == ModelArgs(**PARAMS, max_seq_len=10485760)
    assert (args.rope_scaling_factor, args.rope_low_freq_factor, args.rope_high_freq_factor) == (16.0, 1.0, 1.0)
    unscaled = open_checkpoint(_write(tmp_path, model.state_dict(), 1, max_seq_len=None, use_scaled_rope=False)).args
    assert unscaled.max_seq_len == 262144


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        (lambda s: s.pop("layers.1.feed_forward.experts.moe_w_out_eF_D"), r"1 missing: layers\.1\..*experts\.w2$"),
        (lambda s: s.update({"layers.1.feed_forward.gate": torch.zeros(2)}), r"1 extra: layers\.1\.feed_forward\.gate"),
        (lambda s: s.update({"layers.0.attention.wq.weight": torch.zeros(2)}), r"extra: .*wqkv\.weight"),
        (lambda s: s.update({"layers.3.feed_forward.router_DE": torch.zeros(4, 32)}), r"mis-shaped: .*3\..*router_DE"),
        (
            lambda s: s.update({"layers.3.feed_forward.experts.moe_w_in_eD_F": torch.zeros(48, 128)}),
            r"mis-shaped: layers\.3\.feed_forward\.experts\.w1",
        ),
        (
            lambda s: s.update({"layers.3.feed_forward.experts.moe_w_in_eD_F": torch.zeros(47, 128)}),
            r"1 missing: .*experts\.w1; 1 extra: layers\.3\.feed_forward\.experts\.moe_w_in_eD_F",
        ),
    ],
)  # fmt: skip
def test_a_corrupted_file_is_refused_with_the_name(tmp_path, model, change, culprit):
    def corrupted(part):
        state = NAMINGS["all at once"](part)
        change(state)
        return state

    checkpoint = open_checkpoint(_write(tmp_path, model.state_dict(), 1, corrupted))
    with pytest.raises(CheckpointError, match=culprit):
        checkpoint.load_into(model)


def test_a_wrong_value_in_moe_args_is_named(tmp_path, model):
    folder = _write(tmp_path, model.state_dict(), 1, moe_args={"num_experts": 4, "use_token_choice": False})
    with pytest.raises(CheckpointError, match=r"params\.json does not describe a valid model.*\n.*use_token_choice"):
        open_checkpoint(folder)
