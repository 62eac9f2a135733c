"""Checkpoints on disk, whatever their format: what a model looks like, and its weights for one rank.

A format (gguf.py, huggingface.py, meta.py) maps Meta's parameter names to tensors that can be read
in parts (source.py). Everything after that is shared: which part a rank needs (slices.py), and
checking and copying (loading.py).

Imports on first use: gguf_file.py and hub.py serve tokenizers too, which need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from model.checkpoint.errors import CheckpointError

if TYPE_CHECKING:
    from model.checkpoint.checkpoint import Checkpoint, ExpertWeights
    from model.checkpoint.hub import local_path
    from model.checkpoint.open import open_checkpoint

__all__ = ["Checkpoint", "CheckpointError", "ExpertWeights", "local_path", "open_checkpoint"]

_HOMES = {
    "Checkpoint": "model.checkpoint.checkpoint",
    "ExpertWeights": "model.checkpoint.checkpoint",
    "local_path": "model.checkpoint.hub",
    "open_checkpoint": "model.checkpoint.open",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
