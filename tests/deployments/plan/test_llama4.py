"""The plans of the two Llama 4 models against a count that shares nothing with Moray.

The count is of `transformers`' own model on the meta device, built from the published settings;
no tensor differs by design: the two have the same number of parameters, the vision encoder included.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Llama4Config, Llama4ForConditionalGeneration

from deployments.plan.plan import Given, ModelPlan, plan
from model.checkpoint.architecture import read_args

CONFIGS = Path(__file__).parents[3] / "configs"
TEXT = {
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 202048,
    "num_experts_per_tok": 1,
    "tie_word_embeddings": False,
}
"""text_config of both checkpoints' config.json, as far as it has to do with shapes."""
SCOUT = TEXT | {"num_local_experts": 16, "interleave_moe_layer_step": 1}
MAVERICK = TEXT | {"num_local_experts": 128, "interleave_moe_layer_step": 2}
VISION = {
    "hidden_size": 1408,
    "image_size": 336,
    "patch_size": 14,
    "num_hidden_layers": 34,
    "num_attention_heads": 16,
    "intermediate_size": 5632,
    "pixel_shuffle_ratio": 0.5,
    "projector_input_dim": 4096,
    "projector_output_dim": 4096,
    "vision_output_dim": 4096,
}


def counted(text: dict[str, Any]) -> tuple[int, int]:
    """Bytes of all parameters in bfloat16, and of the routed experts among them."""
    config = Llama4Config(text_config=text, vision_config=VISION)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = Llama4ForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(default)
    sizes = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    return sum(sizes.values()), sum(size for name, size in sizes.items() if ".experts." in name)


@pytest.mark.parametrize(
    ("name", "text", "parameters"),
    [("llama4-scout", SCOUT, 108_641_793_536), ("llama4-maverick", MAVERICK, 401_583_781_376)],
)
def test_bytes_are_those_of_transformers(name: str, text: dict[str, Any], parameters: int) -> None:
    everything, routed = counted(text)
    [planned] = plan(CONFIGS / f"{name}.yaml", Given())
    assert planned.needs is not None
    assert planned.needs.experts is not None
    assert planned.needs.parameters == parameters
    assert planned.needs.weights == everything
    experts = planned.needs.experts
    assert experts.layers * experts.per_layer * experts.each == routed
    _check_ranks(planned, everything - routed)


def _check_ranks(planned: ModelPlan, beside_experts: int) -> None:
    """Ranks together hold what is beside the experts, and what is replicated once more for each further rank."""
    assert planned.needs is not None
    [rank] = planned.needs.ranks
    size = planned.layout.tensor_parallel_size
    again = (rank.weights * size - beside_experts) / (size - 1)
    assert again == REPLICATED[planned.id]


def _replicated(num_experts: int, moe_layers: int) -> int:
    norms = (2 * 48 + 1) * 5120
    routers = moe_layers * 5120 * num_experts
    # A block of the encoder: two norms of weight and bias, and the biases of wo and c_proj, which are added once.
    blocks = 34 * (2 * 2 + 2) * 1408
    encoder = 1408 + (24 * 24 + 1) * 1408 + 2 * 2 * 1408  # class and position embeddings, ln_pre, ln_post
    return 2 * (norms + routers + blocks + encoder)


REPLICATED = {"llama4-scout": _replicated(16, 48), "llama4-maverick": _replicated(128, 24)}
"""Bytes of bfloat16 that every tensor-parallel rank has in full."""


@pytest.mark.parametrize("name", ["llama4-scout", "llama4-maverick"])
def test_the_examples_fit_their_gpus(name: str) -> None:
    [planned] = plan(CONFIGS / f"{name}.yaml", Given())
    assert planned.faults == ()
    assert planned.memory.rank == planned.memory.server == 80 * 10**9


def test_chunked_layers_leave_room_for_more_long_sequences() -> None:
    """Of 48 layers 12 keep all 131,072 tokens, 36 a chunk of 8,192 and a step of 1,024; 160 GiB over all ranks."""
    [planned] = plan(CONFIGS / "llama4-scout.yaml", Given())
    token = 2 * 8 * 128 * 2  # keys and values of a layer, bfloat16
    assert planned.kv_tokens == 160 * 2**30 // (48 * 16 * token) * 16
    assert planned.kv_sequences == pytest.approx(160 * 2**30 / (token * (12 * 131072 + 36 * (8192 + 1024))), rel=1e-4)


@pytest.mark.parametrize(("name", "text"), [("llama4-scout", SCOUT), ("llama4-maverick", MAVERICK)])
def test_the_model_yaml_says_what_config_json_says(name: str, text: dict[str, Any], tmp_path: Path) -> None:
    config = Llama4Config(text_config=text, vision_config=VISION).to_dict()
    config["architectures"] = ["Llama4ForConditionalGeneration"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs, ours = read_args(tmp_path), read_args(CONFIGS / "models" / f"{name}.yaml")
    left_out = {"max_seq_len", "use_qk_norm", "use_scaled_rope"}  # of the instruction-tuned models, not of TEXT
    assert theirs.model_dump(exclude=left_out) == ours.model_dump(exclude=left_out)
