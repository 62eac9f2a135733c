"""What a front keeps of a request so that another engine can go on with it: the tokens that it has.

The random number of a token is a function of the request's seed, its choice and its position, and
penalties and limits are functions of the tokens so far. So the prompt and these tokens are all of a
request's state, and the stream goes on token for token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from deployments.engine.request import TokenDelta
from deployments.front.engine_client import EngineFailure

MAX_FRUITLESS = 4
"""Engines that may die or fail in a row without giving a token before the request itself is under suspicion."""


class EngineLost(Exception):
    """An attempt came to nothing, through no fault of the request: another engine may go on with it."""


class EngineLeft(EngineLost):
    """The same, of an engine that was scaled away or updated: that says nothing about the request."""


class Transcript:
    """The tokens of each choice that were passed on, and which choices are finished."""

    def __init__(self, n: int) -> None:
        self._tokens: list[list[int]] = [[] for _ in range(n)]
        self._finished = [False] * n

    @property
    def is_finished(self) -> bool:
        return all(self._finished)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self._tokens))

    @property
    def outputs(self) -> tuple[tuple[int, ...] | None, ...]:
        """As `EngineRequest.outputs` wants it."""
        return tuple(
            None if finished else tuple(tokens) for tokens, finished in zip(self._tokens, self._finished, strict=True)
        )

    def first(self) -> Sequence[int]:
        """Tokens of the first choice."""
        return self._tokens[0]

    def take(self, delta: TokenDelta) -> TokenDelta | None:
        """What of `delta` is new, to be passed on. Raises EngineLost if tokens before it are missing."""
        tokens = self._tokens[delta.index]
        known = len(tokens) - delta.offset
        if known < 0:
            raise EngineLost(f"{-known} tokens were lost on their way")
        if self._finished[delta.index]:
            return None
        if known:
            delta = _from(delta, known)
            if not delta.token_ids and delta.finish_reason is None:
                return None
        tokens += delta.token_ids
        self._finished[delta.index] = delta.finish_reason is not None
        return delta


def _from(delta: TokenDelta, start: int) -> TokenDelta:
    logprobs = None if delta.logprobs is None else delta.logprobs[start:]
    return msgspec.structs.replace(
        delta, offset=delta.offset + start, token_ids=delta.token_ids[start:], logprobs=logprobs
    )


@dataclass
class Losses:
    """The engines that a request lost in a row. num_tokens: those that had come before the last. causes: why the last
    ones were lost. num_fruitless: how many died or failed, rather than left.
    """

    num_tokens: int = 0
    causes: list[str] = field(default_factory=list)
    num_fruitless: int = 0

    def __str__(self) -> str:
        return f"{'; '.join(self.causes) or 'No engine takes requests'}. {self.num_tokens} tokens had come"

    def add(self, lost: EngineLost, num_tokens: int) -> None:
        """Raises EngineFailure when too many engines died or failed without one more token."""
        if num_tokens > self.num_tokens:
            self.causes, self.num_fruitless = [], 0
        self.num_tokens = num_tokens
        self.causes = [*self.causes, str(lost)][-MAX_FRUITLESS:]
        self.num_fruitless += not isinstance(lost, EngineLeft)
        if self.num_fruitless >= MAX_FRUITLESS:
            raise EngineFailure(f"{self}, none from {self.num_fruitless} engines in a row: the request may be at fault")
