"""Hugging Face's `tokenizer.json`, run by the `tokenizers` library, with the settings that lie beside it."""

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from deployments.front.tokenizer.base import Tokenizer, TokenizerError, Vocabulary
from deployments.front.tokenizer.pieces import byte_level_piece, sentencepiece_piece, table
from deployments.front.tokenizer.settings import Settings, read_settings


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizers.Tokenizer` with the facts of its vocabulary."""

    def __init__(self, backend: tokenizers.Tokenizer, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary)
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend

    def _encode(self, text: str, add_special_tokens: bool, parse_special: bool) -> list[int]:
        backend = self._backend if parse_special else self._plain
        return backend.encode(text, add_special_tokens=add_special_tokens).ids

    def save(self, path: Path) -> None:
        """Writes it as a `tokenizer.json`. Chat template and ends of an answer are not part of that."""
        self._backend.save(str(path))

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """A copy that reads special tokens as text: the switch is a state of the whole tokenizer, not of a call."""
        copy = tokenizers.Tokenizer.from_str(self._backend.to_str())
        copy.encode_special_tokens = True
        return copy


def open_huggingface(path: Path) -> HuggingFaceTokenizer:
    """The tokenizer of a `tokenizer.json` and of the settings in its folder."""
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # `tokenizers` raises bare Exception
        raise TokenizerError(f"{path}: {error}") from error
    return HuggingFaceTokenizer(backend, _vocabulary(path, backend, read_settings(path.parent)))


def _vocabulary(path: Path, backend: tokenizers.Tokenizer, settings: Settings) -> Vocabulary:
    piece, leading_space = _decoding(path, backend)
    added = backend.get_added_tokens_decoder()
    pieces = {i: piece(token) for token, i in backend.get_vocab(with_added_tokens=True).items()}
    pieces |= {i: token.content.encode() for i, token in added.items()}
    return settings.vocabulary(
        pieces=table(pieces.items()),
        special_ids=frozenset(i for i, token in added.items() if token.special),
        token_to_id=backend.token_to_id,
        leading_space=leading_space,
    )


def _decoding(path: Path, backend: tokenizers.Tokenizer) -> tuple[Callable[[str], bytes], bool]:
    """How tokens become bytes, and whether decoding takes a leading space away."""
    decoder: dict[str, Any] = (
        json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {"type": "none"}
    )
    steps: list[dict[str, Any]] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return byte_level_piece, False
    if unknown := set(kinds) - {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}:
        raise TokenizerError(f"{path}: decoder {sorted(unknown)} is not supported (ByteLevel and SentencePiece's are)")
    space, leading_space = "", False
    for step in steps:
        if step["type"] == "Replace" and step["content"] == " ":
            space = step["pattern"].get("String", "")
        if step["type"] == "Metaspace":
            space, leading_space = step["replacement"], step["prepend_scheme"] != "never"
        if step["type"] == "Strip":
            leading_space = step["content"] == " " and step["start"] > 0
    if not space:
        raise TokenizerError(f"{path}: the decoder {kinds} does not say how spaces are spelled")
    return lambda token: sentencepiece_piece(token, space), leading_space
