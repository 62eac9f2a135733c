"""The whole model against transformers' Llama 4 and Mixtral, on configurations drawn at random."""

import random
import re

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Llama4Config,
    Llama4ForCausalLM,
    Llama4ForConditionalGeneration,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
)

from model import LLM, ModelArgs, TransformerInput
from model.args import MoEArgs, Size, VisionArgs
from model.datatypes import MaskedEmbedding

LENGTH = 24

ATTENTION = [
    (r"^layers\.(\d+)\.attention\.w([qkvo])\.", r"model.layers.\1.self_attn.\2_proj."),
    (r"^layers\.(\d+)\.attention_norm", r"model.layers.\1.input_layernorm"),
    (r"^layers\.(\d+)\.ffn_norm", r"model.layers.\1.post_attention_layernorm"),
    (r"^tok_embeddings", "model.embed_tokens"),
    (r"^norm", "model.norm"),
    (r"^output", "lm_head"),
]
LLAMA4 = [
    *ATTENTION,
    (r"^layers\.(\d+)\.feed_forward", r"model.layers.\1.feed_forward"),
    (r"feed_forward\.(shared_expert\.)?w1\.", r"feed_forward.\1gate_proj."),
    (r"feed_forward\.(shared_expert\.)?w2\.", r"feed_forward.\1down_proj."),
    (r"feed_forward\.(shared_expert\.)?w3\.", r"feed_forward.\1up_proj."),
    (r"router_DE", "router.weight"),
    (r"experts\.w1", "experts.gate_up_proj"),
    (r"experts\.w2", "experts.down_proj"),
]
MIXTRAL = [
    *ATTENTION,
    (r"^layers\.(\d+)\.feed_forward\.router_DE", r"model.layers.\1.mlp.gate.weight"),
    (r"^layers\.(\d+)\.feed_forward\.experts\.w1", r"model.layers.\1.mlp.experts.gate_up_proj"),
    (r"^layers\.(\d+)\.feed_forward\.experts\.w2", r"model.layers.\1.mlp.experts.down_proj"),
]
VISION = [
    (r"^vision_projection", "multi_modal_projector.linear_1"),
    (r"^vision_embeddings\.vision_encoder\.", "vision_model."),
    (r"^vision_embeddings\.vision_adapter\.", "vision_model.vision_adapter."),
    (r"conv1\._linear", "patch_embedding.linear"),
    (r"\.ln_pre", ".layernorm_pre"),
    (r"\.ln_post", ".layernorm_post"),
    (r"\.transformer\.resblocks\.", ".model.layers."),
    (r"\.attn\.w([qkvo])\.", r".self_attn.\1_proj."),
    (r"\.ln_1\.", ".input_layernorm."),
    (r"\.ln_2\.", ".post_attention_layernorm."),
    (r"\.c_fc\.", ".fc1."),
    (r"\.c_proj\.", ".fc2."),
]


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


def half_split_rows(weight: Tensor, head_dim: int) -> Tensor:
    """Interleaved rotary rows, as Meta and Llama 4 order them, to the half-split order of Mixtral."""
    return weight.view(-1, head_dim // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def renamed(name: str, table: list[tuple[str, str]]) -> str:
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name


def text_state(model: LLM, table: list[tuple[str, str]], *, is_mixtral: bool) -> dict[str, Tensor]:
    """The text model's weights under transformers' names, arranged as it has them."""
    ours = {name: value for name, value in model.state_dict().items() if not name.startswith("vision_")}
    state = {}
    for name, weight in ours.items():
        if name.endswith("experts.w3"):
            continue  # joined to w1
        value = torch.cat([weight, ours[name[:-1] + "3"]], dim=2) if name.endswith("experts.w1") else weight
        if name.endswith("router_DE") or (is_mixtral and ".experts." in name):
            value = value.transpose(-1, -2)
        is_rotated = is_mixtral and name.endswith(("wq.weight", "wk.weight"))
        state[renamed(name, table)] = half_split_rows(value, model.args.width_of_head) if is_rotated else value
    return state


@torch.no_grad()
def enlarge(model: nn.Module) -> None:
    """Weights at random, large enough to make logits of order one and every part of the model count."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.uniform_(0.5, 1.5) if "ln_" in name or "norm" in name else parameter.normal_()
        else:
            width = parameter.shape[-2] if "experts.w" in name or "router" in name else parameter.shape[-1]
            parameter.normal_(std=1.5 / width**0.5)


def assert_equal(got: Tensor, expected: Tensor, args: ModelArgs) -> None:
    scale = expected.abs().max()
    torch.testing.assert_close(got / scale, expected / scale, rtol=1e-5, atol=1e-5, msg=lambda m: f"{args!r}\n{m}")


def draw_llama4(seed: int) -> ModelArgs:
    rng = random.Random(seed)
    head_dim, n_heads = rng.choice([8, 16, 32]), rng.choice([2, 4, 6])
    moe = MoEArgs(
        num_experts=rng.choice([2, 4, 16]), top_k=rng.choice([1, 2]), interleave_moe_layer_step=rng.choice([1, 2]),
        hidden_dim=rng.choice([24, 48]),
    )  # fmt: skip
    return ModelArgs(
        dim=rng.choice([32, 48, 64]), head_dim=head_dim, n_layers=rng.choice([2, 3, 4]), n_heads=n_heads,
        n_kv_heads=rng.choice([k for k in (1, 2, n_heads) if n_heads % k == 0]), vocab_size=96,
        ffn_hidden_dim=rng.choice([40, 64]), norm_eps=rng.choice([1e-5, 1e-6]), rope_theta=rng.choice([1e4, 5e5]),
        use_scaled_rope=rng.random() < 0.5, rope_scaling_factor=rng.choice([8.0, 16.0]),
        rope_high_freq_factor=rng.choice([2.0, 4.0]), rope_original_max_len=rng.choice([16, 8192]),
        attention_chunk_size=rng.choice([4, 8, 64]), nope_layer_interval=rng.choice([None, 2, 4]),
        use_qk_norm=rng.random() < 0.5, attn_temperature_tuning=rng.random() < 0.5,
        floor_scale=rng.choice([4.0, 8192.0]), max_seq_len=256, moe_args=moe,
    )  # fmt: skip


def rope_parameters(args: ModelArgs) -> dict:
    if not args.use_scaled_rope:
        return {"rope_type": "default", "rope_theta": args.rope_theta}
    return {
        "rope_type": "llama3",
        "rope_theta": args.rope_theta,
        "factor": args.rope_scaling_factor,
        "low_freq_factor": args.rope_low_freq_factor,
        "high_freq_factor": args.rope_high_freq_factor,
        "original_max_position_embeddings": args.rope_original_max_len,
    }


def llama4_config(args: ModelArgs) -> dict:
    return dict(
        hidden_size=args.dim, intermediate_size=args.expert_hidden_dim, intermediate_size_mlp=args.hidden_dim,
        num_hidden_layers=args.n_layers, num_attention_heads=args.n_heads, num_key_value_heads=args.kv_heads,
        head_dim=args.width_of_head, vocab_size=args.vocab_size, rms_norm_eps=args.norm_eps,
        max_position_embeddings=args.max_seq_len, num_experts_per_tok=args.moe_args.top_k,
        num_local_experts=args.moe_args.num_experts,
        interleave_moe_layer_step=args.moe_args.interleave_moe_layer_step, use_qk_norm=args.use_qk_norm,
        rope_parameters=rope_parameters(args), attention_chunk_size=args.attention_chunk_size,
        no_rope_layers=[int(not args.is_nope_layer(layer)) for layer in range(args.n_layers)],
        attn_temperature_tuning=args.attn_temperature_tuning, floor_scale=int(args.floor_scale),
        attn_scale=args.attn_scale,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_llama4_text_logits_equal_transformers(seed):
    args = draw_llama4(seed)
    torch.manual_seed(seed)
    model = LLM(args)
    enlarge(model)
    theirs = Llama4ForCausalLM(Llama4TextConfig(**llama4_config(args))).eval()
    theirs.load_state_dict(text_state(model, LLAMA4, is_mixtral=False))
    tokens = torch.randint(0, args.vocab_size, (2, LENGTH))
    with torch.no_grad():
        assert_equal(model(TransformerInput(tokens)).logits, theirs(tokens).logits, args)


@pytest.mark.parametrize("seed", range(6))
def test_llama4_cached_decode_equals_transformers(seed):
    """Decode is where Meta's reference is wrong; prompts end inside a chunk and go on past its border."""
    args = draw_llama4(seed).model_copy(update={"attention_chunk_size": 8})
    torch.manual_seed(seed)
    model = LLM(args)
    enlarge(model)
    theirs = Llama4ForCausalLM(Llama4TextConfig(**llama4_config(args))).eval()
    theirs.load_state_dict(text_state(model, LLAMA4, is_mixtral=False))
    tokens = torch.randint(0, args.vocab_size, (2, LENGTH))
    model.forward(TransformerInput(tokens[:, :5]), inference=True)
    with torch.no_grad():
        cache = theirs(tokens[:, :5], use_cache=True).past_key_values
        for position in range(5, LENGTH):
            now = tokens[:, position : position + 1]
            expected = theirs(now, past_key_values=cache, use_cache=True).logits
            assert_equal(model.forward(TransformerInput(now, position), inference=True).logits, expected, args)


def draw_mixtral(seed: int) -> ModelArgs:
    rng = random.Random(seed)
    n_heads, experts = rng.choice([2, 4, 6]), rng.choice([2, 4, 8])
    return ModelArgs(
        dim=rng.choice([32, 64]), head_dim=rng.choice([8, 16]), n_layers=rng.choice([1, 2, 3]), n_heads=n_heads,
        n_kv_heads=rng.choice([k for k in (1, 2, n_heads) if n_heads % k == 0]), vocab_size=96,
        norm_eps=rng.choice([1e-5, 1e-6]), rope_theta=rng.choice([1e4, 1e6]), max_seq_len=64,
        moe_args=MoEArgs(
            num_experts=experts, top_k=rng.choice([1, 2]), hidden_dim=rng.choice([24, 48]), router="softmax",
            shared_expert=False,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
def test_mixtral_logits_equal_transformers(seed):
    args = draw_mixtral(seed)
    torch.manual_seed(seed)
    model = LLM(args)
    enlarge(model)
    config = MixtralConfig(
        hidden_size=args.dim, intermediate_size=args.expert_hidden_dim, num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads, num_key_value_heads=args.kv_heads, head_dim=args.width_of_head,
        vocab_size=args.vocab_size, rms_norm_eps=args.norm_eps, max_position_embeddings=args.max_seq_len,
        num_experts_per_tok=args.moe_args.top_k, num_local_experts=args.moe_args.num_experts,
        rope_parameters=rope_parameters(args),
    )  # fmt: skip
    theirs = MixtralForCausalLM(config).eval()
    theirs.load_state_dict(text_state(model, MIXTRAL, is_mixtral=True))
    tokens = torch.randint(0, args.vocab_size, (2, LENGTH))
    with torch.no_grad():
        assert_equal(model(TransformerInput(tokens)).logits, theirs(tokens).logits, args)


IMAGE_TOKEN = 7


def draw_vision(seed: int) -> VisionArgs:
    """transformers has one width for the feed-forward and for what the adapter reads: mlp_ratio follows."""
    rng = random.Random(seed)
    heads, shuffle, patch = rng.choice([1, 2, 3]), rng.choice([1, 2, 3]), rng.choice([2, 4, 7])
    across = patch * shuffle * rng.choice([1, 2])
    return VisionArgs(
        image_size=Size(height=across, width=across), patch_size=Size(height=patch, width=patch),
        dim=heads * 4 * rng.choice([3, 6, 9]), n_heads=heads, n_layers=rng.choice([1, 2]),
        mlp_ratio=shuffle**2, output_dim=rng.choice([16, 40]), pixel_shuffle_ratio=1 / shuffle,
    )  # fmt: skip


def conditional_twin(model: LLM) -> Llama4ForConditionalGeneration:
    args, vision = model.args, model.args.vision_args
    vision_config = dict(
        hidden_size=vision.dim, num_hidden_layers=vision.n_layers, num_attention_heads=vision.n_heads,
        intermediate_size=vision.hidden_dim, vision_output_dim=vision.output_dim,
        image_size=vision.image_size.height, patch_size=vision.patch_size.height,
        pixel_shuffle_ratio=vision.pixel_shuffle_ratio, projector_input_dim=vision.output_dim,
        projector_output_dim=vision.output_dim,
    )  # fmt: skip
    config = Llama4Config(
        text_config=llama4_config(args), vision_config=vision_config, image_token_index=IMAGE_TOKEN,
        boi_token_index=5, eoi_token_index=6,
    )  # fmt: skip
    theirs = Llama4ForConditionalGeneration(config).eval()
    state = {f"language_model.{k}": v for k, v in text_state(model, LLAMA4, is_mixtral=False).items()}
    for name, value in model.state_dict().items():
        if name.startswith("vision_"):
            state[renamed(name, VISION)] = value
    theirs.load_state_dict(state)
    return theirs


@pytest.mark.parametrize("seed", range(16))
def test_conditional_generation_equals_transformers(seed):
    """Two images of one and three tiles in two rows, text around them."""
    args = draw_llama4(seed).model_copy(update={"vision_args": draw_vision(seed)})
    vision = args.vision_args
    torch.manual_seed(seed)
    model = LLM(args)
    enlarge(model)
    theirs = conditional_twin(model)
    images = [[torch.rand(tiles, 3, vision.image_size.height, vision.image_size.width) * 2 - 1] for tiles in (1, 3)]
    pixels = torch.cat([image for row in images for image in row])
    tokens = torch.randint(IMAGE_TOKEN + 1, args.vocab_size, (2, 3 * vision.tokens_per_tile + 4))
    tokens[0, 3 : 3 + vision.tokens_per_tile] = IMAGE_TOKEN
    tokens[1, 2 : 2 + 3 * vision.tokens_per_tile] = IMAGE_TOKEN
    mask = (tokens == IMAGE_TOKEN)[..., None]
    with torch.no_grad():
        expected = theirs.vision_model(pixels).last_hidden_state
        assert_equal(model.vision_embeddings.embed(pixels), expected, args)
        seen = MaskedEmbedding(model.vision_embeddings(images, mask, model.tok_embeddings(tokens)), mask)
        expected = theirs(input_ids=tokens, pixel_values=pixels).logits
        assert_equal(model(TransformerInput(tokens, 0, seen)).logits, expected, args)
