"""The JSON of `/v1/completions`."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

from msgspec.json import encode

from deployments.engine.request import TokenLogprobs
from deployments.front.answer import AnswerFormat
from deployments.front.choice import Piece
from deployments.front.detokenizer import TextOffsets
from deployments.front.generation import Generation
from deployments.front.logprobs import LogprobsFormat, prompt_logprobs
from deployments.front.prompt import Prompt
from deployments.front.protocol.completion import CompletionRequest


class CompletionFormat(AnswerFormat):
    """Events are put together from parts encoded once: for most tokens only their text is encoded."""

    def __init__(self, request: CompletionRequest, generation: Generation, created: int, fingerprint: str) -> None:
        self._request = request
        self._generation = generation
        self._tokenizer = generation.model.tokenizer
        self._header = {
            "id": generation.id,
            "object": "text_completion",
            "created": created,
            "model": generation.model.id,
            "system_fingerprint": fingerprint,
        }
        num_choices = len(generation.choices)
        start = b"data: " + encode(self._header)[:-1] + b',"choices":['
        self._starts = [b'%b{"index":%d,"text":' % (start, index) for index in range(num_choices)]
        self._is_plain = request.logprobs is None and not (request.return_token_ids or request.has_continuous_usage)
        self._logprobs = LogprobsFormat(self._tokenizer, request.logprobs or 0, request.return_tokens_as_token_ids)
        self._unopened = set(range(num_choices)) if request.echo or request.return_token_ids else set()
        self._offsets: list[TextOffsets] = []
        if request.logprobs is not None:
            self._offsets = [self._new_offsets() for _ in range(num_choices)]

    def event(self, piece: Piece) -> bytes:
        is_first = piece.index in self._unopened
        if self._is_plain and piece.finish_reason is None and not is_first:
            if not piece.text:
                return b""
            return self._starts[piece.index] + encode(piece.text) + b',"logprobs":null,"finish_reason":null}]}\n\n'
        self._unopened.discard(piece.index)
        choice = self._choice([piece], is_first)
        if piece.finish_reason is None:
            del choice["stop_reason"]
        usage = {"usage": self._generation.usage_of([piece.index])} if self._request.has_continuous_usage else {}
        return self._event({"choices": [choice], **usage})

    def closing(self) -> bytes:
        if not self._request.includes_usage:
            return b""
        return self._event({"choices": [], "usage": self._generation.usage})

    def whole(self, pieces: list[Piece]) -> bytes:
        by_choice: list[list[Piece]] = [[] for _ in self._generation.choices]
        for piece in pieces:
            by_choice[piece.index].append(piece)
        choices = [self._choice(of_choice, True) for of_choice in by_choice]
        if self._request.prompt_logprobs is not None:
            for choice in choices:
                positions = self._prompt_positions(choice["index"])
                choice["prompt_logprobs"] = prompt_logprobs(self._tokenizer, positions, self._request.prompt_logprobs)
        return encode({**self._header, "choices": choices, "usage": self._generation.usage})

    def _choice(self, pieces: Sequence[Piece], is_first: bool) -> dict[str, Any]:
        """is_first: these are the first pieces of the choice; with `echo` the prompt goes before them."""
        index = pieces[0].index
        echoes = is_first and self._request.echo
        choice: dict[str, Any] = {
            "index": index,
            "text": (self._prompt_text(index) if echoes else "") + "".join(piece.text for piece in pieces),
            "logprobs": self._logprobs_of(pieces, echoes),
            "finish_reason": pieces[-1].finish_reason,
            "stop_reason": pieces[-1].stop_reason,
        }
        if self._request.return_token_ids:
            choice["token_ids"] = list(chain.from_iterable(piece.token_ids for piece in pieces))
            if is_first:
                choice["prompt_token_ids"] = self._prompt(index).token_ids
        return choice

    def _logprobs_of(self, pieces: Sequence[Piece], echoes: bool) -> dict[str, Any] | None:
        if self._request.logprobs is None:
            return None
        index = pieces[0].index
        token_ids = list(chain.from_iterable(piece.token_ids for piece in pieces))
        positions: list[TokenLogprobs | None] = list(chain.from_iterable(piece.logprobs or () for piece in pieces))
        if echoes:
            token_ids = self._prompt(index).token_ids + token_ids
            positions = [*self._prompt_positions(index), *positions]
        return self._logprobs.completion(token_ids, positions, self._offsets[index].push(token_ids))

    def _prompt(self, index: int) -> Prompt:
        return self._generation.prompts[index // self._request.n]

    def _prompt_text(self, index: int) -> str:
        prompt = self._prompt(index)
        return self._tokenizer.decode(prompt.token_ids) if prompt.text is None else prompt.text

    def _prompt_positions(self, index: int) -> list[TokenLogprobs | None]:
        return self._generation.prompt_logprobs[index // self._request.n] or []

    def _new_offsets(self) -> TextOffsets:
        return TextOffsets(
            self._tokenizer,
            skip_special_tokens=self._request.skip_special_tokens,
            continues=not self._request.echo,
        )

    def _event(self, fields: dict[str, Any]) -> bytes:
        return b"data: " + encode({**self._header, **fields}) + b"\n\n"
