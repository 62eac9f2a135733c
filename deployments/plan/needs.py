"""What a model needs: bytes on each rank and expert server, and the tokens that fit beside them. Pure arithmetic.

Sizes are bytes unless a name says otherwise.
"""

from dataclasses import dataclass

import torch

from deployments.config import EngineConfig
from model import sizes
from model.args import ModelArgs


@dataclass(frozen=True)
class RankNeeds:
    """One pipeline stage: each of its tensor-parallel ranks needs the same.

    rotary: float32 tables of every position. kv_per_token: keys and values of the stage's layers.
    """

    stage: int
    first_layer: int
    last_layer: int
    weights: int
    rotary: int
    kv_per_token: int

    @property
    def fixed(self) -> int:
        return self.weights + self.rotary


@dataclass(frozen=True)
class ExpertNeeds:
    """num_experts: (layer, expert) pairs. most: of the fullest server, when copies are spread evenly."""

    num_experts: int
    each: int
    copies: int
    servers: int

    @property
    def most_experts(self) -> int:
        return -(-self.num_experts * self.copies // self.servers)

    @property
    def most(self) -> int:
        return self.most_experts * self.each


@dataclass(frozen=True)
class ModelNeeds:
    """parameters: of the whole model, each once; weights: their bytes. experts: None when they are in the ranks."""

    parameters: int
    weights: int
    tensor_parallel_size: int
    max_model_len: int
    ranks: tuple[RankNeeds, ...]
    experts: ExpertNeeds | None

    @property
    def kv_per_token(self) -> int:
        """Of all ranks together."""
        return self.tensor_parallel_size * sum(rank.kv_per_token for rank in self.ranks)


@dataclass(frozen=True)
class Layout:
    """How a model is spread. servers: of experts; None keeps them in the ranks."""

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    servers: int | None = None
    copies: int = 2


class Model:
    """Shapes of a model, from which any layout's needs are counted."""

    def __init__(self, args: ModelArgs, engine: EngineConfig) -> None:
        self.args, self.engine = args, engine
        self.shapes = sizes.parameter_shapes(args)
        self.bytes_each = getattr(torch, engine.dtype).itemsize

    @property
    def max_model_len(self) -> int:
        return self.engine.max_model_len or self.args.max_seq_len

    def needs(self, layout: Layout) -> ModelNeeds:
        """Raises CheckpointError when the tensor-parallel size does not divide the model."""
        parameters = sizes.num_parameters(self.shapes)
        return ModelNeeds(
            parameters=parameters,
            weights=parameters * self.bytes_each,
            tensor_parallel_size=layout.tensor_parallel_size,
            max_model_len=self.max_model_len,
            ranks=tuple(self._rank(layout, *stage) for stage in enumerate(self._stages(layout))),
            experts=self._experts(layout),
        )

    def _stages(self, layout: Layout) -> list[range]:
        return sizes.stages(self.args.n_layers, layout.pipeline_parallel_size)

    def _rank(self, layout: Layout, stage: int, layers: range) -> RankNeeds:
        share = sizes.Share(layers, layout.tensor_parallel_size, experts=layout.servers is None)
        return RankNeeds(
            stage=stage,
            first_layer=layers.start,
            last_layer=layers.stop - 1,
            weights=sizes.share_parameters(self.shapes, self.args, share) * self.bytes_each,
            rotary=sizes.rotary_bytes(self.args, self.max_model_len),
            kv_per_token=sizes.kv_values_per_token(self.args, share) * self.bytes_each,
        )

    def _experts(self, layout: Layout) -> ExpertNeeds | None:
        if layout.servers is None:
            return None
        each = sizes.expert_parameters(self.shapes, self.args) * self.bytes_each
        return ExpertNeeds(sizes.num_experts(self.args), each, layout.copies, layout.servers)


def kv_tokens(needs: ModelNeeds, engine: EngineConfig, room: int | None) -> int | None:
    """Tokens of keys and values that an engine replica holds, by its scarcest stage; None if nothing tells.

    room: bytes that a rank has for everything.
    """
    budgets = [(rank, kv_budget(rank, engine, room)) for rank in needs.ranks]
    counts = [
        budget // (rank.kv_per_token * engine.block_size) * engine.block_size
        for rank, budget in budgets
        if budget is not None
    ]
    if not counts:
        return None
    if engine.kv_cache_memory is None:  # no more than all sequences need, as in cluster/shard.py
        counts.append(engine.max_num_seqs * -(-needs.max_model_len // engine.block_size) * engine.block_size)
    return min(counts)


def kv_budget(rank: RankNeeds, engine: EngineConfig, room: int | None) -> int | None:
    """Bytes for keys and values on a rank with `room`, as cluster/shard.py takes them."""
    if engine.kv_cache_memory is not None:
        return int(engine.kv_cache_memory)
    return None if room is None else max(0, int((room - rank.fixed) * engine.kv_cache_memory_share))
