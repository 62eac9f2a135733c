"""What a model needs: bytes on each rank and expert server, and the tokens that fit beside them. Pure arithmetic.

Sizes are bytes unless a name says otherwise.
"""

import math
from dataclasses import dataclass

import torch

from cluster.experts.directory import SPARE
from deployments.config import EngineConfig
from model import sizes
from model.args import ModelArgs
from model.kv_groups import BlockNeeds, kv_groups
from model.stage import Stage


@dataclass(frozen=True)
class RankNeeds:
    """One pipeline stage: each of its tensor-parallel ranks needs the same.

    rotary: float32 tables of every position. kv_per_block: keys and values of the stage's layers of one KV group.
    """

    stage: int
    first_layer: int
    last_layer: int
    weights: int
    rotary: int
    kv_per_block: int

    @property
    def fixed(self) -> int:
        return self.weights + self.rotary


@dataclass(frozen=True)
class ExpertNeeds:
    """Experts on servers: `layers` times `per_layer` of them, `each` bytes. memory: of `experts.memory`, or None.

    Every layer is spread over the servers by itself, as cluster/experts places it.
    """

    layers: int
    per_layer: int
    each: int
    copies: int
    servers: int
    memory: int | None

    @property
    def least(self) -> int:
        """Experts that a server must have room for, so that all copies of each have a place."""
        return self.layers * self._a_layer(self.copies)

    @property
    def most(self) -> int:
        """Experts that a server takes: all that `memory` holds, or `least` and an eighth more to follow the load."""
        if self.memory is not None:
            return min(self.memory // self.each, self.layers * self.per_layer)
        return self.layers * self._a_layer(self.copies * SPARE)

    @property
    def most_bytes(self) -> int:
        return self.most * self.each

    def _a_layer(self, copies: float) -> int:
        return min(self.per_layer, math.ceil(copies * self.per_layer / self.servers))


@dataclass(frozen=True)
class ModelNeeds:
    """parameters: of the whole model, each once; weights: their bytes. experts: None when they are in the ranks.

    blocks: how many KV blocks a sequence holds.
    """

    parameters: int
    weights: int
    tensor_parallel_size: int
    max_model_len: int
    blocks: BlockNeeds
    ranks: tuple[RankNeeds, ...]
    experts: ExpertNeeds | None

    @property
    def kv_per_block(self) -> int:
        """Of all ranks together."""
        return self.tensor_parallel_size * sum(rank.kv_per_block for rank in self.ranks)

    @property
    def kv_per_token(self) -> int:
        """Of all ranks together, while all layers keep the token."""
        return self.kv_per_block * len(self.blocks.chunks) // self.blocks.block_size

    @property
    def blocks_per_sequence(self) -> int:
        """Most KV blocks that a sequence of full length holds."""
        return self.blocks.held(self.max_model_len)


@dataclass(frozen=True)
class Layout:
    """How a model is spread. servers: of experts, server_memory bytes each; None keeps the experts in the ranks."""

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    servers: int | None = None
    copies: int = 2
    server_memory: int | None = None


class Model:
    """Shapes of a model, from which any layout's needs are counted."""

    def __init__(self, args: ModelArgs, engine: EngineConfig) -> None:
        self.max_model_len = engine.max_model_len or args.max_seq_len
        self.args, self.engine = args.model_copy(update={"max_seq_len": self.max_model_len}), engine
        self.shapes = sizes.parameter_shapes(args)
        self.bytes_each = getattr(torch, engine.dtype).itemsize

    def needs(self, layout: Layout) -> ModelNeeds:
        """Raises CheckpointError when the tensor-parallel size does not divide the model."""
        parameters, count = sizes.num_parameters(self.shapes), layout.pipeline_parallel_size
        return ModelNeeds(
            parameters=parameters,
            weights=parameters * self.bytes_each,
            tensor_parallel_size=layout.tensor_parallel_size,
            max_model_len=self.max_model_len,
            blocks=BlockNeeds(
                tuple(group.chunk for group in kv_groups(self.args)),
                self.engine.block_size,
                self.engine.max_num_batched_tokens,
            ),
            ranks=tuple(self._rank(layout, Stage(index, count)) for index in range(count)),
            experts=self._experts(layout),
        )

    def _rank(self, layout: Layout, stage: Stage) -> RankNeeds:
        share = sizes.Share(stage, layout.tensor_parallel_size, experts=layout.servers is None)
        layers = stage.layers(self.args.n_layers)
        return RankNeeds(
            stage=stage.index,
            first_layer=layers.start,
            last_layer=layers.stop - 1,
            weights=sizes.share_parameters(self.shapes, self.args, share) * self.bytes_each,
            rotary=sizes.rotary_bytes(self.args, self.max_model_len),
            kv_per_block=sizes.kv_values_per_block(self.args, share, self.engine.block_size) * self.bytes_each,
        )

    def _experts(self, layout: Layout) -> ExpertNeeds | None:
        if layout.servers is None or self.args.moe_args is None:
            return None
        each = sizes.expert_parameters(self.shapes, self.args) * self.bytes_each
        layers, per_layer = sizes.num_moe_layers(self.args), self.args.moe_args.num_experts
        return ExpertNeeds(layers, per_layer, each, layout.copies, layout.servers, layout.server_memory)


def kv_blocks(needs: ModelNeeds, engine: EngineConfig, room: int | None) -> int | None:
    """KV blocks that an engine replica holds; None if nothing tells. As cluster/shard.py counts.

    room: bytes that a rank has for everything.
    """
    if engine.kv_cache_memory is not None:  # over all ranks
        return int(engine.kv_cache_memory) // needs.kv_per_block
    if room is None:
        return None
    blocks = [int((room - rank.fixed) * engine.kv_cache_memory_share) // rank.kv_per_block for rank in needs.ranks]
    return max(0, min(*blocks, engine.max_num_seqs * needs.blocks_per_sequence))
