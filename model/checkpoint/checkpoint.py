"""An open checkpoint: the architecture it is for, and its weights by Meta's names."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from model.args import ModelArgs
from model.checkpoint.loading import load_parameters
from model.checkpoint.slices import check_world_size
from model.checkpoint.source import TensorSource


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

    def load_into(self, model: nn.Module, rank: int = 0, world_size: int = 1) -> None:
        """Fills the parameters of `model`, in their own dtype and device, with the part of `rank`.

        Raises CheckpointError when the model does not cut into `world_size` parts, or names every
        tensor that is missing, extra or mis-shaped; the model is untouched then.
        """
        check_world_size(self.args, rank, world_size)
        load_parameters(dict(model.named_parameters()), self.sources, self.location, rank, world_size)
