"""Turns the tokens of one choice into text that is safe to send now."""

import codecs
from collections.abc import Sequence

from deployments.front.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Detokenizes one choice of one request.

    What `push` and `flush` return, put together, is `tokenizer.decode` of all tokens (up to the
    stop string). A character is returned once all its bytes are here; text that may begin a stop string is held back.

    stop: stop strings. The one that is complete first ends the text; of several complete at once the longest, which
      begins first. So it does not matter how the text was cut into tokens.
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
        self._text = _Utf8Text(tokenizer, skip_special_tokens, continues)
        self._stops = _StopStrings(stop, include_stop_str_in_output) if stop else None
        self._min_tokens = min_tokens

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that became safe with these tokens, maybe none.

        A stop *token* that should not show must not be pushed (special ones are skipped anyway).
        """
        if self._stops is None:
            self.num_tokens += len(token_ids)
            return self._text.push(token_ids)
        safe = []
        for token_id in token_ids:
            if self.stop_reason is not None:
                break
            self.num_tokens += 1
            counts = self.num_tokens > self._min_tokens
            safe.append(self._search(self._stops, self._text.push((token_id,)), counts))
        return "".join(safe)

    def flush(self) -> str:
        """What was held back, at the end of the choice; an incomplete character becomes U+FFFD."""
        if self.stop_reason is not None:
            return ""
        rest = self._text.flush()
        if self._stops is None:
            return rest
        safe = self._search(self._stops, rest, self.num_tokens > self._min_tokens)
        return safe if self.stop_reason is not None else safe + self._stops.rest()

    def _search(self, stops: "_StopStrings", text: str, counts: bool) -> str:
        if not text:
            return ""
        safe, self.stop_reason = stops.push(text, counts)
        return safe


class TextOffsets:
    """Where in the text each token begins: `text_offset` of legacy completions.

    start: characters before the first token (the echoed prompt's). Tokens inside one character share its offset.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, start: int = 0, skip_special_tokens: bool = True, continues: bool = True
    ) -> None:
        self._text = _Utf8Text(tokenizer, skip_special_tokens, continues)
        self._at = start

    def push(self, token_ids: Sequence[int]) -> list[int]:
        """Offsets of these tokens, in characters."""
        offsets = []
        for token_id in token_ids:
            offsets.append(self._at)
            self._at += len(self._text.push((token_id,)))
        return offsets


class _Utf8Text:
    """Text of tokens whose bytes may cut characters: whole characters only, and U+FFFD for bytes that are none."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, continues: bool) -> None:
        self._pieces = tokenizer.shown_pieces(skip_special_tokens)
        self._drop_space = tokenizer.vocabulary.leading_space and not continues
        self._pending = b""

    def push(self, token_ids: Sequence[int]) -> str:
        data = self._pending + self._bytes(token_ids)
        if self._drop_space and data:
            self._drop_space = False
            data = data.removeprefix(b" ")
        text, taken = codecs.utf_8_decode(data, "replace", False)
        self._pending = data[taken:]
        return text

    def _bytes(self, token_ids: Sequence[int]) -> bytes:
        pieces = self._pieces
        if len(token_ids) == 1 and 0 <= token_ids[0] < len(pieces):
            return pieces[token_ids[0]]
        return b"".join([pieces[i] for i in token_ids if 0 <= i < len(pieces)])

    def flush(self) -> str:
        text = self._pending.decode(errors="replace")
        self._pending = b""
        return text


class _StopStrings:
    """Looks for stop strings in text that arrives in parts. `held` is text that may begin one."""

    def __init__(self, stop: Sequence[str], include_in_output: bool) -> None:
        if "" in stop:
            raise ValueError("a stop string must not be empty")
        self._stop = sorted(stop, key=len, reverse=True)
        self._include = include_in_output
        self._told = 0
        self._too_early = 0
        self.held = ""

    def push(self, text: str, counts: bool) -> tuple[str, str | None]:
        """Text that is safe now, and the stop string that ended it.

        counts: False when no stop string may end within this text.
        """
        buffer = self.held + text
        if not counts:
            self._too_early = len(buffer)
        if found := self._earliest(buffer):
            start, stop = found
            end = start + len(stop) if self._include else start
            self.held = ""
            return buffer[self._told : end], stop
        keep = self._may_begin(buffer)
        shown = len(buffer) if self._include else keep
        safe = buffer[self._told : shown]
        self.held = buffer[keep:]
        self._told = shown - keep
        self._too_early = max(0, self._too_early - keep)
        return safe, None

    def _earliest(self, buffer: str) -> tuple[int, str] | None:
        """Start and text of the stop string that ends first; the longest of those that end there."""
        found: tuple[int, int, str] | None = None
        for stop in self._stop:
            start = buffer.find(stop, max(0, self._too_early - len(stop) + 1))
            if start >= 0 and (found is None or start + len(stop) < found[0]):
                found = start + len(stop), start, stop
        return found[1:] if found else None

    def _may_begin(self, buffer: str) -> int:
        """Where the longest ending of `buffer` that begins a stop string starts; its length when there is none."""
        earliest = len(buffer)
        for stop in self._stop:
            start = buffer.find(stop[0], max(0, len(buffer) - len(stop) + 1), earliest)
            while start >= 0 and not stop.startswith(buffer[start:]):
                start = buffer.find(stop[0], start + 1, earliest)
            if start >= 0:
                earliest = start
        return earliest

    def rest(self) -> str:
        """What is held back and was not shown yet, when no more text comes."""
        return self.held[self._told :]
