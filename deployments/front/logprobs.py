"""Log probabilities as the APIs write them. Infinite ones, which JSON has no word for, become -9999 as in vLLM."""

from collections.abc import Iterable, Sequence
from typing import Any

from deployments.engine.request import TokenLogprobs
from deployments.front.tokenizer import Tokenizer

LOWEST = -9999.0


class LogprobsFormat:
    """How one request wants its log probabilities.

    num_top: alternatives for each token. as_token_ids: tokens as "token_id:<id>" in place of their text.
    """

    def __init__(self, tokenizer: Tokenizer, num_top: int, as_token_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._as_token_ids = as_token_ids

    def chat(self, positions: Iterable[TokenLogprobs]) -> dict[str, Any]:
        """As `ChatLogprobs`."""
        return {
            "content": [
                {
                    **self._chat_token(position.token_id, position.logprob),
                    "top_logprobs": [self._chat_token(*top) for top in position.top[: self._num_top]],
                }
                for position in positions
            ]
        }

    def completion(
        self, token_ids: Sequence[int], positions: Sequence[TokenLogprobs | None], offsets: list[int]
    ) -> dict[str, Any]:
        """As `CompletionLogprobs`; the first token of an echoed prompt has None for its position."""
        return {
            "tokens": [self._text(token_id) for token_id in token_ids],
            "token_logprobs": [None if p is None else max(p.logprob, LOWEST) for p in positions],
            "top_logprobs": [None if p is None else self._completion_top(p) for p in positions],
            "text_offset": offsets,
        }

    def _completion_top(self, position: TokenLogprobs) -> dict[str, float]:
        """By text, likeliest first; the chosen token is always among them, as in OpenAI's API."""
        tops: dict[str, float] = {}
        for token_id, logprob in (*position.top[: self._num_top], (position.token_id, position.logprob)):
            tops.setdefault(self._text(token_id), max(logprob, LOWEST))
        return tops

    def _chat_token(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._text(token_id),
            "logprob": max(logprob, LOWEST),
            "bytes": list(self._tokenizer.token_bytes(token_id)),
        }

    def _text(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_token_ids else self._tokenizer.token_text(token_id)


def prompt_logprobs(
    tokenizer: Tokenizer, positions: Iterable[TokenLogprobs | None], num_top: int
) -> list[dict[str, dict[str, Any]] | None]:
    """As `PromptLogprobs`: at each position the top alternatives and the token that is there."""
    return [None if position is None else _prompt_position(tokenizer, position, num_top) for position in positions]


def _prompt_position(tokenizer: Tokenizer, position: TokenLogprobs, num_top: int) -> dict[str, dict[str, Any]]:
    ranked = [(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(position.top[:num_top], 1)]
    there = (position.token_id, position.logprob, position.rank)
    return {
        str(token_id): {
            "logprob": max(logprob, LOWEST),
            "rank": rank,
            "decoded_token": tokenizer.token_text(token_id),
        }
        for token_id, logprob, rank in (there, *(top for top in ranked if top[0] != position.token_id))
    }
