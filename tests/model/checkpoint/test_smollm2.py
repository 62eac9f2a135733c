"""A real quantized model, every tensor of it, beside what `transformers` makes of the same file."""

import pytest
import torch

from model import LLM
from model.checkpoint import CheckpointError, open_checkpoint
from model.checkpoint.huggingface_names import meta_name
from model.checkpoint.source import Interleaved, Mapped


def test_every_tensor_is_the_one_that_transformers_reads(smollm2, transformers_smollm2, load, reassemble):
    model = transformers_smollm2
    checkpoint = open_checkpoint(smollm2)
    expected = {}
    for name, tensor in model.state_dict().items():
        source = Mapped(tensor)
        if "q_proj" in name or "k_proj" in name:
            source = Interleaved(source, 64)
        if name != "lm_head.weight":  # tied
            expected[meta_name(name)] = source.read(tuple(slice(0, size) for size in tensor.shape))
    for loaded in (load(checkpoint), reassemble(checkpoint, 3)):
        assert loaded.keys() == expected.keys()
        for name, tensor in loaded.items():
            assert torch.equal(tensor, expected[name]), name

    config, args = model.config, checkpoint.args
    assert (args.dim, args.n_layers, args.n_heads, args.n_kv_heads) == (576, 30, 9, 3)
    assert args.max_seq_len == config.max_position_embeddings == 8192
    assert args.rope_theta == config.rope_parameters["rope_theta"]
    assert args.norm_eps == config.rms_norm_eps
    assert args.tie_word_embeddings
    assert args.hidden_dim == config.intermediate_size


def test_the_model_is_filled_in_its_own_dtype(smollm2, load):
    checkpoint = open_checkpoint(str(smollm2))
    model = LLM(checkpoint.args, initialize=False).to(torch.bfloat16)
    checkpoint.load_into(model)
    expected = load(checkpoint)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, expected[name].bfloat16()), name


def test_three_key_value_heads_are_not_for_two_ranks(smollm2):
    checkpoint = open_checkpoint(smollm2)
    with pytest.raises(CheckpointError, match=r"size of 2 does not divide .*n_kv_heads \(3\); these sizes do: 1, 3"):
        checkpoint.load_into(LLM(checkpoint.args, initialize=False), rank=0, world_size=2)
