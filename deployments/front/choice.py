"""One choice of one prompt: from the engine's deltas to text, up to where it stops."""

import msgspec

from deployments.engine.request import TokenDelta, TokenLogprobs
from deployments.front.detokenizer import IncrementalDetokenizer
from deployments.front.protocol.chat import ChatRequest
from deployments.front.protocol.completion import CompletionRequest
from deployments.front.served_model import ServedModel


class Piece(msgspec.Struct):
    """News of one choice.

    index: of the choice among all choices of all prompts of the request.
    text: what may be shown now; it lags the tokens while a character or a stop string is incomplete.
    finish_reason: None while it goes on; then "stop" or "length", and `stop_reason` says which stop string or
      stop token it was (None for the model's own end).
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class Choice:
    """Detokenizes one choice and decides when it is over.

    num_tokens: output tokens so far, a stop token and the tokens of a stop string included.
    """

    def __init__(self, index: int, request: ChatRequest | CompletionRequest, model: ServedModel) -> None:
        self.index = index
        self.num_tokens = 0
        self.is_finished = False
        self._detokenizer = IncrementalDetokenizer(
            model.tokenizer,
            stop=request.stop,
            include_stop_str_in_output=request.include_stop_str_in_output,
            skip_special_tokens=request.skip_special_tokens,
            min_tokens=request.min_tokens,
        )
        self._shows_stop_token = request.include_stop_str_in_output
        self._stop_token_ids = frozenset(request.stop_token_ids)
        if not request.ignore_eos:
            self._stop_token_ids -= frozenset(model.tokenizer.eos_token_ids)
        # The engine always makes a token; where the client wants none, it is not shown.
        self._is_mute = request.token_limit == 0

    def push(self, delta: TokenDelta) -> Piece:
        """The engine's news as the client's. After a piece with a `finish_reason` there must be no more."""
        if delta.finish_reason is None and not self._is_mute:
            text = self._detokenizer.push(delta.token_ids)
            if self._detokenizer.stop_reason is None:
                self.num_tokens += len(delta.token_ids)
                return Piece(self.index, text, delta.token_ids, delta.logprobs)
            return self._stopped_by_string(text, delta)
        return self._last(delta)

    def _last(self, delta: TokenDelta) -> Piece:
        self.is_finished = True
        if self._is_mute:
            return Piece(self.index, "", [], None if delta.logprobs is None else [], "length")
        stopped = delta.finish_reason == "stop"
        hidden = stopped and not self._shows_stop_token
        text = self._detokenizer.push(delta.token_ids[:-1] if hidden else delta.token_ids)
        text += self._detokenizer.flush()
        if self._detokenizer.stop_reason is not None:
            return self._stopped_by_string(text, delta)
        self.num_tokens += len(delta.token_ids)
        reason = delta.token_ids[-1] if stopped and delta.token_ids[-1] in self._stop_token_ids else None
        return Piece(self.index, text, delta.token_ids, delta.logprobs, delta.finish_reason, reason)

    def _stopped_by_string(self, text: str, delta: TokenDelta) -> Piece:
        self.is_finished = True
        taken = self._detokenizer.num_tokens - self.num_tokens
        self.num_tokens += taken
        logprobs = None if delta.logprobs is None else delta.logprobs[:taken]
        return Piece(self.index, text, delta.token_ids[:taken], logprobs, "stop", self._detokenizer.stop_reason)
