"""The JSON of `/v1/chat/completions`."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

from msgspec.json import encode

from deployments.front.answer import AnswerFormat
from deployments.front.choice import Piece
from deployments.front.generation import Generation
from deployments.front.logprobs import LogprobsFormat, prompt_logprobs
from deployments.front.protocol.chat import ChatRequest


class ChatFormat(AnswerFormat):
    """Events are put together from parts encoded once: for most tokens only their text is encoded."""

    def __init__(self, request: ChatRequest, generation: Generation, created: int, fingerprint: str) -> None:
        self._request = request
        self._generation = generation
        self._header = {
            "id": generation.id,
            "object": "chat.completion.chunk",
            "created": created,
            "model": generation.model.id,
            "system_fingerprint": fingerprint,
        }
        start = b"data: " + encode(self._header)[:-1] + b',"choices":['
        self._starts = [b'%b{"index":%d,"delta":{"content":' % (start, index) for index in range(request.n)]
        self._logprobs = LogprobsFormat(
            generation.model.tokenizer, request.top_logprobs, request.return_tokens_as_token_ids
        )
        self._is_plain = not (request.logprobs or request.return_token_ids or request.has_continuous_usage)

    def opening(self) -> bytes:
        return b"".join(self._event(self._role_event(index)) for index in range(self._request.n))

    def event(self, piece: Piece) -> bytes:
        if piece.finish_reason is None and self._is_plain:
            if not piece.text:
                return b""
            return self._starts[piece.index] + encode(piece.text) + b'},"logprobs":null,"finish_reason":null}]}\n\n'
        choice: dict[str, Any] = {
            "index": piece.index,
            "delta": {"content": piece.text},
            "logprobs": self._logprobs_of([piece]),
            "finish_reason": piece.finish_reason,
        }
        if piece.finish_reason is not None:
            choice["stop_reason"] = piece.stop_reason
        if self._request.return_token_ids:
            choice["token_ids"] = piece.token_ids
        return self._event({"choices": [choice], **self._usage_so_far(piece.index)})

    def closing(self) -> bytes:
        if not self._request.includes_usage:
            return b""
        return self._event({"choices": [], "usage": self._generation.usage})

    def whole(self, pieces: list[Piece]) -> bytes:
        by_choice: list[list[Piece]] = [[] for _ in range(self._request.n)]
        for piece in pieces:
            by_choice[piece.index].append(piece)
        answer: dict[str, Any] = {
            **self._header,
            "object": "chat.completion",
            "choices": [self._choice(index, of_choice) for index, of_choice in enumerate(by_choice)],
            "usage": self._generation.usage,
        }
        positions = self._generation.prompt_logprobs[0]
        if self._request.prompt_logprobs is not None and positions is not None:
            tokenizer = self._generation.model.tokenizer
            answer["prompt_logprobs"] = prompt_logprobs(tokenizer, positions, self._request.prompt_logprobs)
        if self._request.return_token_ids:
            answer["prompt_token_ids"] = self._generation.prompts[0].token_ids
        return encode(answer)

    def _choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        choice = {
            "index": index,
            "message": {"role": "assistant", "content": "".join(piece.text for piece in pieces), "refusal": None},
            "logprobs": self._logprobs_of(pieces),
            "finish_reason": pieces[-1].finish_reason,
            "stop_reason": pieces[-1].stop_reason,
        }
        if self._request.return_token_ids:
            choice["token_ids"] = list(chain.from_iterable(piece.token_ids for piece in pieces))
        return choice

    def _logprobs_of(self, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        if not self._request.logprobs:
            return None
        return self._logprobs.chat(chain.from_iterable(piece.logprobs or () for piece in pieces))

    def _role_event(self, index: int) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        event = {"choices": [choice], **self._usage_so_far(index)}
        if self._request.return_token_ids:
            event["prompt_token_ids"] = self._generation.prompts[0].token_ids
        return event

    def _usage_so_far(self, index: int) -> dict[str, Any]:
        return {"usage": self._generation.usage_of([index])} if self._request.has_continuous_usage else {}

    def _event(self, fields: dict[str, Any]) -> bytes:
        return b"data: " + encode({**self._header, **fields}) + b"\n\n"
