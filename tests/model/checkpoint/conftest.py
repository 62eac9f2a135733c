"""Whole and sliced reads of a checkpoint, and small Llamas to write checkpoints of."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    Llama4Config,
    Llama4ForCausalLM,
    Llama4ForConditionalGeneration,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from model.args import ModelArgs
from model.checkpoint import Checkpoint
from model.checkpoint.loading import load_parameters
from model.checkpoint.slices import rank_region, split_dim
from tests.model.checkpoint.random_weights import randomized

SMOLLM2 = Path(__file__).parents[3] / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    if not SMOLLM2.is_file():
        pytest.skip(f"{SMOLLM2} is not there: `make test` fetches it")
    return SMOLLM2


def _load(checkpoint: Checkpoint, rank: int = 0, world_size: int = 1, dtype=torch.float32) -> dict[str, Tensor]:
    parameters = {}
    for name, source in checkpoint.sources.items():
        region = rank_region(name, source.shape, rank, world_size)
        parameters[name] = torch.full([part.stop - part.start for part in region], torch.nan, dtype=dtype)
    load_parameters(parameters, checkpoint.sources, checkpoint.location, rank, world_size)
    return parameters


@pytest.fixture
def load() -> Callable[..., dict[str, Tensor]]:
    """load(checkpoint, rank, world_size, dtype) -> name -> what that rank holds."""
    return _load


@pytest.fixture
def reassemble() -> Callable[[Checkpoint, int], dict[str, Tensor]]:
    """reassemble(checkpoint, world_size) -> name -> the join of what all ranks hold."""

    def join(checkpoint: Checkpoint, world_size: int) -> dict[str, Tensor]:
        ranks = [_load(checkpoint, rank, world_size) for rank in range(world_size)]
        whole = {}
        for name in ranks[0]:
            dim = split_dim(name)
            whole[name] = ranks[0][name] if dim is None else torch.cat([rank[name] for rank in ranks], dim)
        return whole

    return join


@pytest.fixture
def tiny_llama() -> Callable[..., LlamaForCausalLM]:
    """A random Llama of `transformers`, 12 query heads of 8 over 4 groups; keywords go to its config."""

    def build(**settings) -> LlamaForCausalLM:
        torch.manual_seed(3)
        defaults = {
            "hidden_size": 96,
            "intermediate_size": 144,
            "num_hidden_layers": 2,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "vocab_size": 120,
            "max_position_embeddings": 128,
        }
        return LlamaForCausalLM(LlamaConfig(**defaults | settings)).eval()

    return build


@pytest.fixture
def meta_weights() -> Callable[[ModelArgs], dict[str, Tensor]]:
    """Random weights under Meta's names."""

    def build(args: ModelArgs) -> dict[str, Tensor]:
        torch.manual_seed(5)
        q, kv = args.n_heads * args.width_of_head, args.kv_heads * args.width_of_head
        weights = {
            "tok_embeddings.weight": torch.randn(args.vocab_size, args.dim),
            "norm.weight": torch.randn(args.dim),
            "output.weight": torch.randn(args.vocab_size, args.dim),
        }
        for layer in range(args.n_layers):
            weights |= {
                f"layers.{layer}.attention.wq.weight": torch.randn(q, args.dim),
                f"layers.{layer}.attention.wk.weight": torch.randn(kv, args.dim),
                f"layers.{layer}.attention.wv.weight": torch.randn(kv, args.dim),
                f"layers.{layer}.attention.wo.weight": torch.randn(args.dim, q),
                f"layers.{layer}.feed_forward.w1.weight": torch.randn(args.hidden_dim, args.dim),
                f"layers.{layer}.feed_forward.w2.weight": torch.randn(args.dim, args.hidden_dim),
                f"layers.{layer}.feed_forward.w3.weight": torch.randn(args.hidden_dim, args.dim),
                f"layers.{layer}.attention_norm.weight": torch.randn(args.dim),
                f"layers.{layer}.ffn_norm.weight": torch.randn(args.dim),
            }
        if args.tie_word_embeddings:
            del weights["output.weight"]
        return weights

    return build


@pytest.fixture
def llama4_folder(tmp_path):
    """A Llama 4 with dense and MoE layers that divides over up to 4 ranks."""
    settings = {
        "hidden_size": 32, "intermediate_size": 24, "intermediate_size_mlp": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "vocab_size": 96,
        "max_position_embeddings": 64, "num_local_experts": 4, "interleave_moe_layer_step": 2, "pad_token_id": None,
    }  # fmt: skip
    randomized(Llama4ForCausalLM(Llama4TextConfig(**settings)), 1).save_pretrained(tmp_path / "llama4")
    return tmp_path / "llama4"


@pytest.fixture
def mixtral_folder(tmp_path):
    settings = {
        "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "vocab_size": 96, "max_position_embeddings": 64, "num_local_experts": 4,
    }  # fmt: skip
    randomized(MixtralForCausalLM(MixtralConfig(**settings)), 1).save_pretrained(tmp_path / "mixtral")
    return tmp_path / "mixtral"


IMAGE_TOKEN = 7


@pytest.fixture
def llama4_vision() -> Llama4ForConditionalGeneration:
    """Tiles of 4 by 4 patches, of which 2 by 2 become a token."""
    text = {
        "hidden_size": 32, "intermediate_size": 24, "intermediate_size_mlp": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "vocab_size": 96,
        "max_position_embeddings": 64, "num_local_experts": 4, "interleave_moe_layer_step": 2, "pad_token_id": None,
    }  # fmt: skip
    vision = {
        "hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
        "vision_output_dim": 40, "projector_input_dim": 40, "projector_output_dim": 40, "image_size": 16,
        "patch_size": 4,
    }  # fmt: skip
    config = Llama4Config(text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN)
    return randomized(Llama4ForConditionalGeneration(config), 4)


@pytest.fixture
def llama4_vision_folder(tmp_path, llama4_vision) -> Path:
    llama4_vision.save_pretrained(tmp_path)
    return tmp_path
