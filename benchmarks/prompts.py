"""Real, varied text for measurements: Python's own language reference, present in every Python.

Spans never overlap and none is handed out twice, so no prompt finds another's prefix in a
server's cache.
"""

from pathlib import Path
from pydoc_data import topics

from tokenizers import Tokenizer


def real_text() -> str:
    """About 465,000 characters of English prose and code (Python 3.11)."""
    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


class PromptSource:
    """Hands out spans of a text, cut at token boundaries of one tokenizer.

    Raises `ValueError` when the text has been used up.
    """

    def __init__(self, tokenizer: Path, text: str | None = None) -> None:
        self._text = real_text() if text is None else text
        encoding = Tokenizer.from_file(str(tokenizer)).encode(self._text, add_special_tokens=False)
        self._starts = [start for start, _ in encoding.offsets] + [len(self._text)]
        self._next = 0

    def take(self, count: int, num_tokens: int) -> list[str]:
        """`count` prompts of `num_tokens` tokens each (a cut may merge or split one at the edges)."""
        return [self._take_one(num_tokens) for _ in range(count)]

    def _take_one(self, num_tokens: int) -> str:
        end = self._next + num_tokens
        if end >= len(self._starts):
            raise ValueError(f"the text has {len(self._starts) - 1} tokens; all are used: run fewer rounds")
        span = self._text[self._starts[self._next] : self._starts[end]]
        self._next = end
        return span
