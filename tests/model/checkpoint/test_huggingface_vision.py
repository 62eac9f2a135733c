"""Llama 4 with its image encoder, as `transformers` saves it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import LLM, TransformerInput
from model.args import Size
from model.checkpoint import CheckpointError, open_checkpoint
from model.checkpoint.slices import rank_region
from model.datatypes import MaskedEmbedding
from tests.model.checkpoint.conftest import IMAGE_TOKEN


def test_logits_equal_those_of_transformers(llama4_vision, llama4_vision_folder):
    checkpoint = open_checkpoint(llama4_vision_folder)
    vision = checkpoint.args.vision_args
    assert (vision.image_size, vision.tokens_per_tile, vision.hidden_dim) == (Size(height=16, width=16), 4, 192)
    model = LLM(checkpoint.args, initialize=False)
    checkpoint.load_into(model)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1
    tokens = torch.randint(IMAGE_TOKEN + 1, 96, (1, 14), generator=generator)
    tokens[0, 3:11] = IMAGE_TOKEN
    mask = (tokens == IMAGE_TOKEN)[..., None]
    with torch.no_grad():
        expected = llama4_vision(input_ids=tokens, pixel_values=pixels).logits
        seen = MaskedEmbedding(model.vision_embeddings([[pixels]], mask, model.tok_embeddings(tokens)), mask)
        got = model(TransformerInput(tokens, 0, seen)).logits
    scale = expected.abs().max()
    torch.testing.assert_close(got / scale, expected / scale, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_together_hold_every_tensor(llama4_vision_folder, world_size, load, reassemble):
    checkpoint = open_checkpoint(llama4_vision_folder)
    whole, joined = load(checkpoint), reassemble(checkpoint, world_size)
    assert whole.keys() == dict(LLM(checkpoint.args).named_parameters()).keys()
    for name, tensor in whole.items():
        assert torch.equal(joined[name], tensor), name


def test_a_size_that_does_not_divide_is_refused_with_those_that_do(llama4_vision_folder):
    checkpoint = open_checkpoint(llama4_vision_folder)
    with pytest.raises(CheckpointError, match=r"size of 8 does not divide .*vision n_heads \(4\).*do: 1, 2, 4"):
        checkpoint.load_into(LLM(checkpoint.args), 0, 8)


@pytest.mark.parametrize(
    ("part", "changes", "culprit"),
    [
        ("vision_config", {"hidden_act": "silu"}, "hidden_act = 'silu'"),
        ("vision_config", {"projector_input_dim": 41}, "projector_input_dim = 41"),
        ("vision_config", {"rope_parameters": {"rope_theta": 5.0}}, "rope_theta = 5.0"),
        ("vision_config", {"pixel_shuffle_ratio": 0.3}, "pixel_shuffle_ratio"),
        ("vision_config", {"image_size": 17}, "image_size.height (17) must be a multiple of patch_size.height (4)"),
        ("text_config", {"attention_bias": True}, "attention_bias = True"),
        ("text_config", {"hidden_size": None}, "has no hidden_size"),
    ],
)
def test_what_is_not_supported_is_named(llama4_vision_folder, part, changes, culprit):
    path = llama4_vision_folder / "config.json"
    config = json.loads(path.read_text())
    config[part] |= changes
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(llama4_vision_folder)
    assert culprit in str(raised.value)


def test_a_corrupted_file_is_refused_with_the_name(llama4_vision_folder):
    path = llama4_vision_folder / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    del weights["vision_model.layernorm_pre.bias"]
    weights["vision_model.layernorm_mid.bias"] = torch.zeros(4)
    fc1 = "vision_model.model.layers.1.mlp.fc1.weight"
    weights[fc1] = weights[fc1].T.contiguous()
    save_file(weights, path)
    checkpoint = open_checkpoint(llama4_vision_folder)
    message = (
        r"1 missing: .*ln_pre\.bias; 1 extra: vision_model\.layernorm_mid\.bias; 1 mis-shaped: .*\.1\.mlp\.c_fc\.weight"
    )
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load_into(LLM(checkpoint.args))


@pytest.mark.parametrize("num_files", [1, 2])
def test_metas_files_hold_the_encoder_too(llama4_vision_folder, tmp_path_factory, num_files):
    """Written from the other format: each file is a rank's slice."""
    checkpoint = open_checkpoint(llama4_vision_folder)
    model = LLM(checkpoint.args, initialize=False)
    checkpoint.load_into(model)
    folder = tmp_path_factory.mktemp("meta")
    for rank in range(num_files):
        state = {
            name: tensor[rank_region(name, tensor.shape, rank, num_files)].clone()
            for name, tensor in model.state_dict().items()
        }
        torch.save(state, folder / f"consolidated.{rank:02d}.pth")
    (folder / "params.json").write_text(json.dumps(checkpoint.args.model_dump(mode="json")))
    again = open_checkpoint(folder)
    assert again.args == checkpoint.args
    other = LLM(again.args, initialize=False)
    again.load_into(other)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
