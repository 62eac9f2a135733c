"""Llama models as `transformers` saves them: config.json beside safetensors files.

Their rotary pairs are the halves of a head; rows of q and k are rearranged on reading.
"""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.args import ModelArgs
from model.checkpoint.checkpoint import Checkpoint
from model.checkpoint.config import model_args, read_json, refuse, required
from model.checkpoint.errors import CheckpointError
from model.checkpoint.source import Interleaved, Mapped, TensorSource

_ARCHITECTURE = "LlamaForCausalLM"
_INDEX = "model.safetensors.index.json"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_NAMES = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER_NAMES = {
    "self_attn.q_proj.weight": "attention.wq.weight",
    "self_attn.k_proj.weight": "attention.wk.weight",
    "self_attn.v_proj.weight": "attention.wv.weight",
    "self_attn.o_proj.weight": "attention.wo.weight",
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_ROTATED = ("attention.wq.weight", "attention.wk.weight")
_DERIVED = "rotary_emb.inv_freq"
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "hidden_act": ("silu", "swish"),
    "sliding_window": (),
    "use_sliding_window": (False,),
    "layer_types": (),
    "quantization_config": (),
    "partial_rotary_factor": (1.0,),
    "rope_interleaved": (False,),
    "num_local_experts": (0,),
    "is_decoder": (True,),
}


def open_huggingface(folder: Path) -> Checkpoint:
    """Opens the Llama model in `folder`."""
    origin = folder / "config.json"
    config = read_json(origin)
    args = _args(config, origin)
    sources: dict[str, TensorSource] = {}
    for name, tensor in _tensors(folder).items():
        if name.endswith(_DERIVED) or (name == "lm_head.weight" and args.tie_word_embeddings):
            continue
        canonical = _canonical(name)
        source: TensorSource = Mapped(tensor)
        if canonical.endswith(_ROTATED):
            source = Interleaved(source, args.width_of_head)
        sources[canonical] = source
    return Checkpoint(str(folder), args, sources)


def _canonical(name: str) -> str:
    """Meta's name of a tensor, or its own when Meta has none."""
    if layer := _LAYER.fullmatch(name):
        return f"layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}" if layer[2] in _LAYER_NAMES else name
    return _NAMES.get(name, name)


def _tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors, memory-mapped."""
    tensors: dict[str, Tensor] = {}
    for path in _files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
    unsupported = [f"{name} ({tensor.dtype})" for name, tensor in tensors.items() if tensor.dtype not in _FLOATS]
    if unsupported:
        raise CheckpointError(f"{folder}: tensors of unsupported types: {', '.join(unsupported[:10])}")
    return tensors


def _files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if index.is_file():
        files = [folder / name for name in sorted(set(required(read_json(index), "weight_map", index).values()))]
    elif (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    else:
        files = sorted(folder.glob("*.safetensors"))
        if len(files) > 1:
            raise CheckpointError(f"{folder} has several safetensors files, but no {_INDEX} to say which to take")
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks files that its index names: {', '.join(missing)}; download them again")
    return files


def _args(config: dict[str, Any], origin: Path) -> ModelArgs:
    architectures = config.get("architectures") or [_ARCHITECTURE]
    if architectures != [_ARCHITECTURE]:
        raise CheckpointError(f"{origin}: {', '.join(architectures)} is not supported, only {_ARCHITECTURE}")
    refuse(config, _NEUTRAL, origin)
    return model_args(
        origin,
        dim=required(config, "hidden_size", origin),
        n_layers=required(config, "num_hidden_layers", origin),
        n_heads=required(config, "num_attention_heads", origin),
        n_kv_heads=config.get("num_key_value_heads"),
        head_dim=config.get("head_dim"),
        vocab_size=required(config, "vocab_size", origin),
        ffn_hidden_dim=required(config, "intermediate_size", origin),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        max_seq_len=config.get("max_position_embeddings", 2048),
        **_rope_fields(config, origin),
    )


def _rope_fields(config: dict[str, Any], origin: Path) -> dict[str, Any]:
    """From `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    refuse(rope, {"partial_rotary_factor": (1.0,)}, origin)
    fields: dict[str, Any] = {"rope_theta": rope.get("rope_theta") or config.get("rope_theta") or 10000.0}
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
