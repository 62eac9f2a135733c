"""Which part of a tensor a tensor-parallel rank holds. Pure functions of names and shapes.

A new kind of parameter is a new line of the table. A tensor that a format stores fused or
otherwise arranged is taken apart by its source; here every name means one matrix.
"""

import math
import re
from collections.abc import Sequence

from model.args import ModelArgs
from model.checkpoint.errors import CheckpointError
from model.checkpoint.source import Region

_SPLIT_DIMS: dict[str, int | None] = {
    "tok_embeddings.weight": 0,
    "output.weight": 0,
    "norm.weight": None,
    "attention.wq.weight": 0,
    "attention.wk.weight": 0,
    "attention.wv.weight": 0,
    "attention.wo.weight": 1,
    "feed_forward.w1.weight": 0,
    "feed_forward.w2.weight": 1,
    "feed_forward.w3.weight": 0,
    "feed_forward.router_DE": None,
    "feed_forward.experts.w1": 2,
    "feed_forward.experts.w2": 1,
    "feed_forward.experts.w3": 2,
    "feed_forward.shared_expert.w1.weight": 0,
    "feed_forward.shared_expert.w2.weight": 1,
    "feed_forward.shared_expert.w3.weight": 0,
    "attention_norm.weight": None,
    "ffn_norm.weight": None,
    "vision_projection.weight": 0,
    "vision_embeddings.vision_adapter.mlp.c_fc.weight": 0,
    "vision_embeddings.vision_adapter.mlp.c_proj.weight": 1,
    "vision_embeddings.vision_encoder.conv1._linear.weight": 0,
    "vision_embeddings.vision_encoder.class_embedding": None,
    "vision_embeddings.vision_encoder.positional_embedding_vlm": None,
    "vision_embeddings.vision_encoder.ln_pre.weight": None,
    "vision_embeddings.vision_encoder.ln_pre.bias": None,
    "vision_embeddings.vision_encoder.ln_post.weight": None,
    "vision_embeddings.vision_encoder.ln_post.bias": None,
    "attn.wq.weight": 0,
    "attn.wq.bias": 0,
    "attn.wk.weight": 0,
    "attn.wk.bias": 0,
    "attn.wv.weight": 0,
    "attn.wv.bias": 0,
    "attn.wo.weight": 1,
    "attn.wo.bias": None,
    "mlp.c_fc.weight": 0,
    "mlp.c_fc.bias": 0,
    "mlp.c_proj.weight": 1,
    "mlp.c_proj.bias": None,
    "ln_1.weight": None,
    "ln_1.bias": None,
    "ln_2.weight": None,
    "ln_2.bias": None,
}
"""Parameter -> the dimension that is split over ranks; None: every rank holds all of it."""

_LAYER = re.compile(r"^(layers|vision_embeddings\.vision_encoder\.transformer\.resblocks)\.\d+\.")


def split_dim(name: str) -> int | None:
    """The dimension of parameter `name` that is split over ranks, None if it is replicated."""
    kind = _LAYER.sub("", name)
    if kind not in _SPLIT_DIMS:
        raise CheckpointError(f"do not know how {name} is split over tensor-parallel ranks")
    return _SPLIT_DIMS[kind]


def rank_region(name: str, shape: Sequence[int], rank: int, world_size: int) -> Region:
    """What `rank` of `world_size` holds of the tensor `name` of full `shape`."""
    region = [slice(0, size) for size in shape]
    dim = split_dim(name)
    if dim is not None and world_size > 1:
        size, rest = divmod(shape[dim], world_size)
        if rest:
            raise CheckpointError(f"dimension {dim} of {name} ({shape[dim]}) does not divide by {world_size}")
        region[dim] = slice(rank * size, (rank + 1) * size)
    return tuple(region)


def possible_world_sizes(args: ModelArgs) -> list[int]:
    """The tensor-parallel sizes that cut this model into equal parts of whole heads."""
    common = math.gcd(*_split_counts(args).values())
    return [size for size in range(1, common + 1) if common % size == 0]


def check_world_size(args: ModelArgs, rank: int, world_size: int) -> None:
    """CheckpointError, with the sizes that are possible, when the model cannot be cut over `world_size` ranks."""
    if not 0 <= rank < world_size:
        raise CheckpointError(f"rank {rank} is not one of {world_size} ranks")
    undivided = [f"{name} ({count})" for name, count in _split_counts(args).items() if count % world_size]
    if undivided:
        possible = ", ".join(map(str, possible_world_sizes(args)))
        raise CheckpointError(
            f"a tensor-parallel size of {world_size} does not divide {', '.join(undivided)}; these sizes do: {possible}"
        )


def _split_counts(args: ModelArgs) -> dict[str, int]:
    counts = {"n_heads": args.n_heads, "n_kv_heads": args.kv_heads, "vocab_size": args.vocab_size}
    moe_layers = [args.is_moe_layer(layer) for layer in range(args.n_layers)]
    if not all(moe_layers):
        counts["ffn_hidden_dim"] = args.hidden_dim
    if any(moe_layers):
        counts["expert_hidden_dim"] = args.expert_hidden_dim
    if vision := args.vision_args:
        counts |= {"dim": args.dim, "vision n_heads": vision.n_heads, "vision hidden_dim": vision.hidden_dim}
        counts["vision output_dim"] = vision.output_dim
    return counts
