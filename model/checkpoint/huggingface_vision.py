"""The image encoder of `transformers`' Llama 4: its settings as VisionArgs, its names as Meta's."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.checkpoint.config import refuse, required

_NAMES = {
    "multi_modal_projector.linear_1.weight": "vision_projection.weight",
    "vision_model.patch_embedding.linear.weight": "vision_embeddings.vision_encoder.conv1._linear.weight",
    "vision_model.class_embedding": "vision_embeddings.vision_encoder.class_embedding",
    "vision_model.positional_embedding_vlm": "vision_embeddings.vision_encoder.positional_embedding_vlm",
    "vision_model.layernorm_pre.weight": "vision_embeddings.vision_encoder.ln_pre.weight",
    "vision_model.layernorm_pre.bias": "vision_embeddings.vision_encoder.ln_pre.bias",
    "vision_model.layernorm_post.weight": "vision_embeddings.vision_encoder.ln_post.weight",
    "vision_model.layernorm_post.bias": "vision_embeddings.vision_encoder.ln_post.bias",
    "vision_model.vision_adapter.mlp.fc1.weight": "vision_embeddings.vision_adapter.mlp.c_fc.weight",
    "vision_model.vision_adapter.mlp.fc2.weight": "vision_embeddings.vision_adapter.mlp.c_proj.weight",
}
_BLOCK_NAMES = {
    "self_attn.q_proj": "attn.wq",
    "self_attn.k_proj": "attn.wk",
    "self_attn.v_proj": "attn.wv",
    "self_attn.o_proj": "attn.wo",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
}
_BLOCK = re.compile(r"vision_model\.model\.layers\.(\d+)\.(.+)\.(weight|bias)")


def vision_name(name: str) -> str:
    """Meta's name of a tensor, or its own when it is none of the encoder's."""
    block = _BLOCK.fullmatch(name)
    if block and block[2] in _BLOCK_NAMES:
        return f"vision_embeddings.vision_encoder.transformer.resblocks.{block[1]}.{_BLOCK_NAMES[block[2]]}.{block[3]}"
    return _NAMES.get(name, name)


def vision_args(config: Mapping[str, Any], origin: Path) -> dict[str, Any]:
    """Fields of VisionArgs. Raises CheckpointError naming each setting that is not supported."""
    output_dim = required(config, "vision_output_dim", origin)
    neutral: dict[str, tuple[Any, ...]] = {
        "hidden_act": ("gelu",),
        "num_channels": (3,),
        "multi_modal_projector_bias": (False,),
        "vision_feature_select_strategy": ("default",),
        "projector_input_dim": (output_dim,),
        "projector_output_dim": (output_dim,),
        "rope_theta": (10000, 10000.0),
    }
    refuse(config, neutral, origin)
    rope = {"rope_theta": (10000, 10000.0), "rope_type": ("default",)}
    refuse(config.get("rope_parameters") or {}, rope, origin)
    dim, hidden_dim = required(config, "hidden_size", origin), required(config, "intermediate_size", origin)
    ratio = hidden_dim / dim
    return {
        "image_size": _size(required(config, "image_size", origin)),
        "patch_size": _size(required(config, "patch_size", origin)),
        "dim": dim,
        "n_layers": required(config, "num_hidden_layers", origin),
        "n_heads": required(config, "num_attention_heads", origin),
        "mlp_ratio": ratio if int(ratio * dim) == hidden_dim else math.nextafter(ratio, math.inf),
        "output_dim": output_dim,
        "pixel_shuffle_ratio": config.get("pixel_shuffle_ratio", 0.5),
    }


def _size(side: int | list[int]) -> dict[str, int]:
    height, width = side if isinstance(side, list) else (side, side)
    return {"height": height, "width": width}
