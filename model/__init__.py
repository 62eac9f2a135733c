"""The transformer: torch and fairscale. Knows neither Ray nor HTTP."""

from model.args import ModelArgs
from model.datatypes import TransformerInput, TransformerOutput
from model.model import LLM

__all__ = ["LLM", "ModelArgs", "TransformerInput", "TransformerOutput"]
