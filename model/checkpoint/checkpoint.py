"""An open checkpoint: the architecture it is for, and its weights by Meta's names."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.args import ModelArgs
from model.checkpoint.errors import CheckpointError
from model.checkpoint.loading import load_parameters
from model.checkpoint.slices import check_world_size, rank_region
from model.checkpoint.source import TensorSource
from model.stage import WHOLE, Stage

_EXPERTS = ".feed_forward.experts."


class ExpertWeights(NamedTuple):
    """One expert, laid out as in `LocalExperts`; hidden is a rank's part of it."""

    w1: Tensor  # [dim, hidden], the gate
    w2: Tensor  # [hidden, dim]
    w3: Tensor  # [dim, hidden]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """location: what to call it in messages.

    args: `max_seq_len` is the context length the model was made for.
    sources: Meta's parameter name -> the whole tensor, unread. A tensor of the file that has no
        counterpart in a Llama stays under its own name, and is reported as extra on loading.
    """

    location: str
    args: ModelArgs
    sources: Mapping[str, TensorSource]

    def load_into(
        self, model: nn.Module, rank: int = 0, world_size: int = 1, *, experts: bool = True, stage: Stage = WHOLE
    ) -> None:
        """Fills the parameters of `model`, in their own dtype and device, with the part of `rank`.

        world_size: tensor-parallel ranks. stage: of a pipeline, whose other layers are left unread.
        Without `experts`, for a model whose routed experts are elsewhere, theirs are left unread.
        Raises CheckpointError when the model does not cut into `world_size` parts, or names every
        tensor that is missing, extra or mis-shaped; the model is untouched then.
        """
        check_world_size(self.args, rank, world_size)
        sources = {
            name: source
            for name, source in self.sources.items()
            if (experts or _EXPERTS not in name) and stage.owns(name, self.args.n_layers)
        }
        load_parameters(dict(model.named_parameters()), sources, self.location, rank, world_size)

    def read_expert(
        self, layer: int, expert: int, *, dtype: torch.dtype | None = None, rank: int = 0, world_size: int = 1
    ) -> ExpertWeights:
        """One routed expert (both from 0), or a rank's slice of it, and nothing else of the checkpoint.

        dtype: None keeps the one it is stored in. Raises CheckpointError when there is no such
        expert, or its tensors are missing or mis-shaped.
        """
        moe = self.args.moe_args
        if moe is None or not 0 <= layer < self.args.n_layers or not self.args.is_moe_layer(layer):
            raise CheckpointError(f"{self.location}: layer {layer} has no experts")
        if not 0 <= expert < moe.num_experts:
            raise CheckpointError(
                f"{self.location}: layer {layer} has experts 0 to {moe.num_experts - 1}, not {expert}"
            )
        check_world_size(self.args, rank, world_size)
        dim, hidden = self.args.dim, self.args.expert_hidden_dim
        shapes = {"w1": (dim, hidden), "w2": (hidden, dim), "w3": (dim, hidden)}
        read = (
            self._read_of_expert(f"layers.{layer}{_EXPERTS}{name}", expert, (moe.num_experts, *shape), rank, world_size)
            for name, shape in shapes.items()
        )
        return ExpertWeights(*(torch.empty(part.shape, dtype=dtype or part.dtype).copy_(part) for part in read))

    def _read_of_expert(self, name: str, expert: int, shape: tuple[int, ...], rank: int, world_size: int) -> Tensor:
        if name not in self.sources:
            raise CheckpointError(f"{self.location}: {name} is missing")
        source = self.sources[name]
        if source.shape != shape:
            raise CheckpointError(f"{self.location}: {name} is mis-shaped: {list(source.shape)}, not {list(shape)}")
        _, *rest = rank_region(name, shape, rank, world_size)
        return source.read((slice(expert, expert + 1), *rest))[0]
