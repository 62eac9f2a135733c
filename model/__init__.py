"""The transformer: torch and fairscale. Knows neither Ray nor HTTP.

Imports on first use: a process that reads no more than a vocabulary needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.args import ModelArgs
    from model.datatypes import TransformerInput, TransformerOutput
    from model.model import LLM

__all__ = ["LLM", "ModelArgs", "TransformerInput", "TransformerOutput"]

_HOMES = {
    "LLM": "model.model",
    "ModelArgs": "model.args",
    "TransformerInput": "model.datatypes",
    "TransformerOutput": "model.datatypes",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
