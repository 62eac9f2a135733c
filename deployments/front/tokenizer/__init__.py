"""Tokenizers of every kind of checkpoint behind one interface."""

from deployments.front.tokenizer.base import Tokenizer, TokenizerError, Vocabulary
from deployments.front.tokenizer.open import open_tokenizer

__all__ = ["Tokenizer", "TokenizerError", "Vocabulary", "open_tokenizer"]
