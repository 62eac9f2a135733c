"""How many bytes of weights and keys a rank holds, and an expert, counted before anything is loaded.

Counts go over the parameters of a real `LLM` of fake tensors, which have shapes and no memory,
cut by the same table that loads checkpoints. So nothing here knows what a layer is made of.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from model.args import ModelArgs
from model.checkpoint.slices import rank_region
from model.kv_groups import kv_groups, layers_per_block
from model.model import LLM
from model.parallel import ensure_model_parallel, model_parallel_size
from model.stage import WHOLE, Stage

Shapes = Mapping[str, torch.Size]
"""By parameter name, of the whole model."""

_EXPERTS = ".feed_forward.experts."


class Share(NamedTuple):
    """What one rank holds: of one stage, the part of `tensor_rank` of `tensor_size`.

    experts: whether the routed experts are in the rank, not on servers of their own.
    """

    stage: Stage = WHOLE
    tensor_size: int = 1
    experts: bool = True
    tensor_rank: int = 0


def parameter_shapes(args: ModelArgs) -> Shapes:
    """The shape of every parameter of the model that `args` describe. Takes no memory, even for 400 billion."""
    ensure_model_parallel()
    if model_parallel_size() > 1:
        raise RuntimeError("shapes of a whole model are to be had in a process with one tensor-parallel rank only")
    # fairscale's layers ask for CPU memory by name, past the meta device; a fake tensor mode catches that, too.
    with FakeTensorMode():
        model = LLM(args.model_copy(update={"max_seq_len": 1}), initialize=False)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def num_parameters(shapes: Shapes, which: Callable[[str], bool] = lambda name: True) -> int:
    """Of those whose name is `which`, each counted once."""
    return sum(shape.numel() for name, shape in shapes.items() if which(name))


def is_routed_expert(name: str) -> bool:
    return _EXPERTS in name


def share_parameters(shapes: Shapes, args: ModelArgs, share: Share) -> int:
    """How many parameters a rank holds. Raises CheckpointError when a tensor does not divide."""
    return sum(
        math.prod(part.stop - part.start for part in rank_region(name, shape, share.tensor_rank, share.tensor_size))
        for name, shape in shapes.items()
        if share.stage.owns(name, args.n_layers) and (share.experts or not is_routed_expert(name))
    )


def expert_parameters(shapes: Shapes, args: ModelArgs) -> int:
    """Parameters of one expert of one layer."""
    return num_parameters(shapes, is_routed_expert) // num_experts(args) if args.moe_args else 0


def num_moe_layers(args: ModelArgs) -> int:
    return sum(args.is_moe_layer(layer) for layer in range(args.n_layers))


def num_experts(args: ModelArgs) -> int:
    """Routed experts of all layers."""
    return num_moe_layers(args) * args.moe_args.num_experts if args.moe_args else 0


def kv_values_per_block(args: ModelArgs, share: Share, block_size: int) -> int:
    """Numbers that a rank keeps for a KV block: keys and values of its heads, of its layers of one group."""
    layers = layers_per_block(kv_groups(args), share.stage.layers(args.n_layers))
    return 2 * layers * block_size * args.kv_heads // share.tensor_size * args.width_of_head


def rotary_bytes(args: ModelArgs, max_model_len: int) -> int:
    """Of the cosines and sines, float32, that every rank has for every position."""
    return max_model_len * args.width_of_head * torch.float32.itemsize
