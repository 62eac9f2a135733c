"""The config.json of `transformers`' Llama, Mixtral and Llama 4, as ModelArgs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from model.args import ModelArgs
from model.checkpoint.config import model_args, refuse, required
from model.checkpoint.errors import CheckpointError
from model.checkpoint.huggingface_vision import vision_args

Config = Mapping[str, Any]
Neutral = Mapping[str, tuple[Any, ...]]

_NEUTRAL: Neutral = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "hidden_act": ("silu", "swish"),
    "sliding_window": (),
    "use_sliding_window": (False,),
    "quantization_config": (),
    "partial_rotary_factor": (1.0,),
    "rope_interleaved": (False,),
    "is_decoder": (True,),
}


@dataclass(frozen=True)
class Architecture:
    """One of `transformers`' causal language models.

    model_type, rope_theta: what an old config.json may leave out.
    neutral: settings that must be as here, beside those of all architectures.
    fields: the fields of ModelArgs that only this architecture has.
    halves: rotary pairs are the halves of a head, not neighbours.
    sees: the text model's settings are in `text_config`, its image encoder's in `vision_config`.
    """

    model_type: str
    rope_theta: float
    neutral: Neutral
    fields: Callable[[Config, Path], dict[str, Any]]
    halves: bool
    sees: bool = False


def args_of(config: Config, architecture: Architecture, origin: Path) -> ModelArgs:
    """ModelArgs of a config.json. Raises CheckpointError naming each setting that is not supported."""
    if not architecture.sees:
        return model_args(origin, **_text_fields(config, architecture, origin))
    refuse(config, {"quantization_config": ()}, origin)
    text = {"tie_word_embeddings": config.get("tie_word_embeddings"), **required(config, "text_config", origin)}
    vision = vision_args(required(config, "vision_config", origin), origin)
    return model_args(origin, **_text_fields(text, architecture, origin), vision_args=vision)


def _text_fields(config: Config, architecture: Architecture, origin: Path) -> dict[str, Any]:
    refuse(config, {"model_type": (architecture.model_type,), **_NEUTRAL, **architecture.neutral}, origin)
    common = {
        "dim": required(config, "hidden_size", origin),
        "n_layers": required(config, "num_hidden_layers", origin),
        "n_heads": required(config, "num_attention_heads", origin),
        "n_kv_heads": config.get("num_key_value_heads"),
        "head_dim": config.get("head_dim"),
        "vocab_size": required(config, "vocab_size", origin),
        "ffn_hidden_dim": required(config, "intermediate_size", origin),
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
        "max_seq_len": config.get("max_position_embeddings", 2048),
    }
    return common | _rope_fields(config, architecture.rope_theta, origin) | architecture.fields(config, origin)


def _llama_fields(config: Config, origin: Path) -> dict[str, Any]:
    return {}


def _mixtral_fields(config: Config, origin: Path) -> dict[str, Any]:
    moe = _moe_args(config, origin) | {"router": "softmax", "shared_expert": False}
    return {"moe_args": moe}


def _llama4_fields(config: Config, origin: Path) -> dict[str, Any]:
    n_layers = required(config, "num_hidden_layers", origin)
    step = config.get("interleave_moe_layer_step", 1)
    moe_layers = config.get("moe_layers")
    if moe_layers is None:
        moe_layers = list(range(step - 1, n_layers, step))
    interval = config.get("no_rope_layer_interval", 4)
    has_rope = config.get("no_rope_layers") or [(layer + 1) % interval != 0 for layer in range(n_layers)]
    nope_layers = [layer for layer, rope in enumerate(has_rope[:n_layers]) if not rope]
    fields = {
        "ffn_hidden_dim": required(config, "intermediate_size_mlp", origin),
        "nope_layer_interval": _interval("no_rope_layers", nope_layers, n_layers, origin),
        "attention_chunk_size": _chunk_size(config, nope_layers, n_layers, origin),
        "use_qk_norm": config.get("use_qk_norm", True),
        "attn_temperature_tuning": bool(config.get("attn_temperature_tuning", True)),
        "floor_scale": config.get("floor_scale", 8192),
        "attn_scale": config.get("attn_scale", 0.1),
    }
    moe_step = _interval("moe_layers", moe_layers, n_layers, origin)
    if moe_step is None:
        return fields
    return fields | {"moe_args": _moe_args(config, origin) | {"interleave_moe_layer_step": moe_step}}


def _moe_args(config: Config, origin: Path) -> dict[str, Any]:
    return {
        "num_experts": required(config, "num_local_experts", origin),
        "top_k": required(config, "num_experts_per_tok", origin),
        "hidden_dim": required(config, "intermediate_size", origin),
    }


def _interval(key: str, layers: list[int], n_layers: int, origin: Path) -> int | None:
    """The n for which `layers` are n - 1, 2n - 1, …; None when there are none."""
    if not layers:
        return None
    interval = layers[0] + 1
    if layers != list(range(interval - 1, n_layers, interval)):
        raise CheckpointError(f"{origin}: not supported: {key} that are not at one interval (layers {layers})")
    return interval


def _chunk_size(config: Config, nope_layers: list[int], n_layers: int, origin: Path) -> int | None:
    """Chunked attention is that of the layers with rotary embedding, or of none."""
    chunk_size: int | None = config.get("attention_chunk_size", 8192)
    types = config.get("layer_types")
    chunked = ["full_attention" if layer in nope_layers else "chunked_attention" for layer in range(n_layers)]
    if types is None or types == chunked:
        return chunk_size
    if types == ["full_attention"] * n_layers:
        return None
    raise CheckpointError(f"{origin}: not supported: layer_types other than {chunked} or all 'full_attention'")


def _rope_fields(config: Config, theta: float, origin: Path) -> dict[str, Any]:
    """From `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    refuse(rope, {"partial_rotary_factor": (1.0,)}, origin)
    fields: dict[str, Any] = {"rope_theta": rope.get("rope_theta") or config.get("rope_theta") or theta}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return fields
    if kind != "llama3":
        raise CheckpointError(f"{origin}: rope scaling {kind!r} is not supported, only 'llama3'")
    return fields | {
        "use_scaled_rope": True,
        "rope_scaling_factor": required(rope, "factor", origin),
        "rope_low_freq_factor": required(rope, "low_freq_factor", origin),
        "rope_high_freq_factor": required(rope, "high_freq_factor", origin),
        "rope_original_max_len": required(rope, "original_max_position_embeddings", origin),
    }


LLAMA = Architecture("llama", 10000.0, {"num_local_experts": (0,), "layer_types": ()}, _llama_fields, halves=True)
MIXTRAL = Architecture("mixtral", 1000000.0, {"layer_types": ()}, _mixtral_fields, halves=True)
LLAMA4 = Architecture("llama4_text", 500000.0, {}, _llama4_fields, halves=False)
ARCHITECTURES = {
    "LlamaForCausalLM": LLAMA,
    "MixtralForCausalLM": MIXTRAL,
    "Llama4ForCausalLM": LLAMA4,
    "Llama4ForConditionalGeneration": replace(LLAMA4, sees=True),
}
