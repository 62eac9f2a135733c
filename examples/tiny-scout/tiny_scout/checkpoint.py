"""Saves a model as `transformers` saves a `Llama4ForConditionalGeneration`: safetensors and config.json."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Llama4Config, Llama4ForConditionalGeneration

from model import LLM, ModelArgs
from model.checkpoint.huggingface_names import meta_name


def save(model: LLM, folder: Path, image_token: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes config.json and model.safetensors."""
    config = _config(model.args, image_token, dtype)
    with torch.device("meta"):
        names = Llama4ForConditionalGeneration(config).state_dict()
    ours = model.state_dict()
    stored = {name: _stored(meta_name(name), ours).to(dtype).contiguous() for name in names}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)


def _stored(name: str, ours: dict[str, Tensor]) -> Tensor:
    """The tensor of one of Meta's names, laid out as `transformers` does."""
    if name.endswith("router_DE"):
        return ours[name].T
    if name.endswith("experts.w13"):
        stem = name.removesuffix("13")
        return torch.cat([ours[stem + "1"], ours[stem + "3"]], dim=2)
    return ours[name]


def _config(args: ModelArgs, image_token: int, dtype: torch.dtype) -> Llama4Config:
    moe, vision = args.moe_args, args.vision_args
    assert moe is not None
    assert vision is not None
    has_rope = [int(not args.is_nope_layer(layer)) for layer in range(args.n_layers)]
    text = {
        "hidden_size": args.dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.kv_heads,
        "head_dim": args.width_of_head,
        "vocab_size": args.vocab_size,
        "intermediate_size": args.expert_hidden_dim,
        "intermediate_size_mlp": args.hidden_dim,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "interleave_moe_layer_step": moe.interleave_moe_layer_step,
        "rms_norm_eps": args.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": args.rope_theta},
        "no_rope_layers": has_rope,
        "layer_types": ["chunked_attention" if rope else "full_attention" for rope in has_rope],
        "attention_chunk_size": args.attention_chunk_size,
        "use_qk_norm": args.use_qk_norm,
        "attn_temperature_tuning": args.attn_temperature_tuning,
        "floor_scale": int(args.floor_scale),
        "attn_scale": args.attn_scale,
        "max_position_embeddings": args.max_seq_len,
        "tie_word_embeddings": args.tie_word_embeddings,
        "pad_token_id": None,
    }
    seen = {
        "hidden_size": vision.dim,
        "intermediate_size": vision.hidden_dim,
        "num_hidden_layers": vision.n_layers,
        "num_attention_heads": vision.n_heads,
        "image_size": vision.image_size.width,
        "patch_size": vision.patch_size.width,
        "pixel_shuffle_ratio": vision.pixel_shuffle_ratio,
        "vision_output_dim": vision.output_dim,
        "projector_input_dim": vision.output_dim,
        "projector_output_dim": vision.output_dim,
    }
    return Llama4Config(
        architectures=["Llama4ForConditionalGeneration"],
        dtype=dtype,
        image_token_index=image_token,
        tie_word_embeddings=args.tie_word_embeddings,
        text_config=text,
        vision_config=seen,
    )
