"""Turns the tokens of one choice into text that is safe to send now."""

from collections.abc import Sequence

from deployments.front.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Detokenizes one choice of one request.

    What `push` and `flush` return, put together, is `tokenizer.decode` of all tokens (up to the
    stop string). A character is returned once all its bytes are here; text that may begin a stop string is held back.

    stop: stop strings; the one that begins first in the text wins.
    min_tokens: a stop string counts only if it ends after the text of that many tokens.
    continues: other text (the prompt's) goes before, so a leading space is kept.

    Attributes:
      stop_reason: the stop string that was found, or None. Once it is set nothing more is returned and the caller
        should abort the request.
      num_tokens: tokens taken, up to and including the one that completed the stop string.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
        continues: bool = True,
    ) -> None:
        self.stop_reason: str | None = None
        self.num_tokens = 0
        raise NotImplementedError

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that became safe with these tokens, maybe none.

        A stop *token* that should not show must not be pushed (special ones are skipped anyway).
        """
        raise NotImplementedError

    def flush(self) -> str:
        """What was held back, at the end of the choice; an incomplete character becomes U+FFFD."""
        raise NotImplementedError


class TextOffsets:
    """Where in the text each token begins: `text_offset` of legacy completions.

    start: characters before the first token (the echoed prompt's). Tokens inside one character share its offset.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, start: int = 0, skip_special_tokens: bool = True, continues: bool = True
    ) -> None:
        raise NotImplementedError

    def push(self, token_ids: Sequence[int]) -> list[int]:
        """Offsets of these tokens, in characters."""
        raise NotImplementedError
