"""The one interface of every tokenizer: text to ids, ids to exact bytes.

Owns what all vocabularies share: decoding is the concatenation of the tokens' bytes, so that
decoding a stream and decoding a whole agree by construction. It does not know where a
vocabulary came from.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType


class TokenizerError(ValueError):
    """A tokenizer's files are missing, malformed, or of a kind that is not supported."""


@dataclass(frozen=True)
class Vocabulary:
    """The facts of a vocabulary.

    pieces: the bytes each token stands for, by id; unused ids are empty.
    special_ids: control tokens, left out of decoded text by `skip_special_tokens`.
    bos_token_id: None when the model has none.
    eos_token_ids: every token that ends an answer, the tokenizer's own first, then those of
      `generation_config.json`.
    special_tokens: what chat templates see as variables: "bos_token", "eos_token", "unk_token", "pad_token" as text.
    chat_template: the checkpoint's jinja2 source, or None.
    leading_space: SentencePiece puts a space before the text it encodes; decoding a whole text takes it away again.
    """

    pieces: Sequence[bytes]
    special_ids: frozenset[int] = frozenset()
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    special_tokens: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    chat_template: str | None = None
    leading_space: bool = False


class Tokenizer(ABC):
    """Encodes and decodes one model's text. Safe to use from several threads at once."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.vocab_size = len(vocabulary.pieces)
        self.bos_token_id = vocabulary.bos_token_id
        self.eos_token_ids = vocabulary.eos_token_ids
        self.special_ids = vocabulary.special_ids
        self.special_tokens = vocabulary.special_tokens
        self.chat_template = vocabulary.chat_template

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of `text`.

        add_special_tokens: put the tokens around it that the model was trained with (BOS, mostly). False for a
          rendered chat template, which writes its own.
        parse_special: text such as "<|im_end|>" becomes the special token it names. False encodes it as plain text.

        Raises UnicodeEncodeError (a ValueError) when the text holds a lone surrogate, which has no bytes.
        """
        text.encode()
        return self._encode(text, add_special_tokens, parse_special)

    @abstractmethod
    def _encode(self, text: str, add_special_tokens: bool, parse_special: bool) -> list[int]: ...

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True, continues: bool = False) -> str:
        """Text of `ids`. Bytes that are no UTF-8 become U+FFFD; ids outside the vocabulary are nothing.

        continues: other text goes before, so a leading space stays (only SentencePiece makes a difference).
        """
        data = b"".join(self.token_bytes(i) for i in ids if not (skip_special_tokens and i in self.special_ids))
        if self.vocabulary.leading_space and not continues:
            data = data.removeprefix(b" ")
        return data.decode(errors="replace")

    def shown_pieces(self, skip_special_tokens: bool) -> Sequence[bytes]:
        """What each token adds to decoded text, by id: `vocabulary.pieces`, special ones empty if they are skipped."""
        return self._pieces_without_special if skip_special_tokens else self.vocabulary.pieces

    @cached_property
    def _pieces_without_special(self) -> Sequence[bytes]:
        return [b"" if i in self.special_ids else piece for i, piece in enumerate(self.vocabulary.pieces)]

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes of a token, special or not; nothing for an id outside the vocabulary."""
        return self.vocabulary.pieces[token_id] if 0 <= token_id < self.vocab_size else b""

    def token_text(self, token_id: int) -> str:
        r"""A token as logprobs show it: its text, or "bytes:\xe2\x80" (as OpenAI writes it) for part of a character."""
        data = self.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
