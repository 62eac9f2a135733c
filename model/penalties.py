"""What changes the logits of one row before a token is chosen from it."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


class SeenTokens:
    """The distinct tokens of a prompt and its output, with how often each is in the output. O(1) to extend."""

    def __init__(self, prompt: Iterable[int], outputs: Iterable[int] = ()) -> None:
        distinct = dict.fromkeys(prompt)
        self._place = {token: place for place, token in enumerate(distinct)}
        self._tokens = np.fromiter(distinct, np.int64, len(distinct))
        self._counts = np.zeros(len(distinct), np.float32)
        for token in outputs:
            self.add(token)

    def add(self, token: int) -> None:
        """Counts one more output token."""
        place = self._place.setdefault(token, len(self._place))
        if place >= len(self._tokens):
            self._tokens = np.resize(self._tokens, 2 * place + 16)
            grown = np.zeros(len(self._tokens), np.float32)
            grown[: len(self._counts)] = self._counts
            self._counts = grown
        self._tokens[place] = token
        self._counts[place] += 1

    @property
    def tokens(self) -> NDArray[np.int64]:
        return self._tokens[: len(self._place)]

    @property
    def counts(self) -> NDArray[np.float32]:
        """Occurrences in the output; 0 for a token of the prompt only."""
        return self._counts[: len(self._place)]


@dataclass(frozen=True)
class Adjustment:
    """Changes of one logit row, in the order of vLLM: ban, bias, then penalties."""

    row: int
    banned: tuple[int, ...] = ()
    bias: dict[int, float] | None = None
    seen: SeenTokens | None = None
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0

    def apply(self, logits: NDArray[np.float32]) -> None:
        """Changes `logits` [vocab_size] in place."""
        if self.bias:
            logits[list(self.bias)] += np.fromiter(self.bias.values(), np.float32, len(self.bias))
        if self.banned:
            logits[list(self.banned)] = -np.inf
        if self.seen is not None:
            tokens, counts = self.seen.tokens, self.seen.counts
            values = logits[tokens]
            values = np.where(values > 0, values / np.float32(self.repetition), values * np.float32(self.repetition))
            values -= np.float32(self.frequency) * counts + np.float32(self.presence) * (counts > 0)
            logits[tokens] = values
