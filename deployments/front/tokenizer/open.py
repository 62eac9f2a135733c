"""Finds out which kind of tokenizer a location holds."""

from deployments.front.tokenizer.base import Tokenizer


def open_tokenizer(location: str) -> Tokenizer:
    """The tokenizer at a GGUF file, a `tokenizer.json`, a `tokenizer.model`, a folder with one of them, or `hf://org/name`.

    Raises TokenizerError that names the location and what is wrong with it.
    """
    raise NotImplementedError
