"""SentencePiece's `tokenizer.model` (Llama 2, Mistral, Gemma), run by the `sentencepiece` library.

SentencePiece puts a space before the text it encodes. As in Llama 2, every stretch of text
between special tokens gets one.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

from deployments.front.tokenizer.base import Tokenizer, TokenizerError, Vocabulary
from deployments.front.tokenizer.pieces import sentencepiece_piece, table
from deployments.front.tokenizer.settings import Settings, read_settings

MODEL_FORMAT: Any = sentencepiece_model_pb2
"""The messages of a model file (protobuf makes them at import, unseen by type checkers)."""

_PIECE = MODEL_FORMAT.ModelProto.SentencePiece


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model.

    named: tokens that SentencePiece does not read out of text itself: special ones, and those that were added.
    """

    def __init__(
        self,
        processor: SentencePieceProcessor,
        vocabulary: Vocabulary,
        named: Mapping[str, int],
        *,
        add_bos: bool = True,
        add_eos: bool = False,
    ) -> None:
        super().__init__(vocabulary)
        self._processor = processor
        self._named = dict(named)
        self._plain = {token: i for token, i in named.items() if i not in vocabulary.special_ids}
        self._before = [vocabulary.bos_token_id] if add_bos and vocabulary.bos_token_id is not None else []
        self._after = list(vocabulary.eos_token_ids[:1]) if add_eos else []
        self._split_named = _alternatives(self._named)
        self._split_plain = _alternatives(self._plain)

    def _encode(self, text: str, add_special_tokens: bool, parse_special: bool) -> list[int]:
        split = self._split_named if parse_special else self._split_plain
        ids: list[int] = []
        for part in split.split(text) if split else [text]:
            if split and split.fullmatch(part):
                ids.append(self._named[part])
            elif part:
                ids.extend(self._processor.encode(part))
        return [*self._before, *ids, *self._after] if add_special_tokens else ids


def open_sentencepiece(path: Path) -> SentencePieceTokenizer:
    """The tokenizer of a SentencePiece model file and of the settings in its folder."""
    return build_sentencepiece(path.read_bytes(), read_settings(path.parent), origin=str(path))


def build_sentencepiece(
    model: bytes, settings: Settings, *, origin: str, add_bos: bool = True, add_eos: bool = False
) -> SentencePieceTokenizer:
    """The tokenizer of a serialized SentencePiece model. Raises TokenizerError naming `origin`."""
    try:
        processor = SentencePieceProcessor(model_proto=model)
    except (RuntimeError, ValueError) as error:
        raise TokenizerError(f"{origin}: not a SentencePiece model: {error}") from error
    proto = MODEL_FORMAT.ModelProto.FromString(model)
    special = {i for i, piece in enumerate(proto.pieces) if piece.type in (_PIECE.CONTROL, _PIECE.UNKNOWN)}
    special |= {i for i, (_, is_special) in settings.added_tokens.items() if is_special}
    added = {token: i for i, (token, _) in settings.added_tokens.items()}
    named = {proto.pieces[i].piece: i for i in special if i < len(proto.pieces)} | added
    pieces = {i: _bytes(piece) for i, piece in enumerate(proto.pieces)} | {i: t.encode() for t, i in added.items()}
    vocabulary = _with_defaults(settings, processor).vocabulary(
        pieces=table(pieces.items()),
        special_ids=frozenset(special),
        token_to_id=lambda token: named[token] if token in named else processor.piece_to_id(token),
        leading_space=proto.normalizer_spec.add_dummy_prefix,
    )
    return SentencePieceTokenizer(processor, vocabulary, named, add_bos=add_bos, add_eos=add_eos)


def _with_defaults(settings: Settings, processor: SentencePieceProcessor) -> Settings:
    """The model's own BOS, EOS and unknown token where the settings name none."""
    ids = {"bos_token": processor.bos_id(), "eos_token": processor.eos_id(), "unk_token": processor.unk_id()}
    own = {name: processor.id_to_piece(i) for name, i in ids.items() if i >= 0}
    return Settings(
        {**own, **settings.special_tokens}, settings.eos_token_ids, settings.chat_template, settings.added_tokens
    )


def _bytes(piece: Any) -> bytes:
    if piece.type in (_PIECE.NORMAL, _PIECE.BYTE, _PIECE.USER_DEFINED):
        return sentencepiece_piece(piece.piece)
    return piece.piece.encode()


def _alternatives(tokens: Mapping[str, int]) -> re.Pattern[str] | None:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if tokens else None
