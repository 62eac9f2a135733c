"""Everything one API request generates: its prompts, their choices, and what they cost."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from deployments.engine.request import SamplingParams, TokenDelta, TokenLogprobs
from deployments.front.choice import Choice, Piece
from deployments.front.engine_client import EngineUnavailable
from deployments.front.metrics import ModelMetrics
from deployments.front.prompt import Prompt
from deployments.front.protocol.chat import ChatRequest
from deployments.front.protocol.completion import CompletionRequest
from deployments.front.sampling import sampling_params
from deployments.front.served_model import ServedModel


class Generation:
    """Runs each prompt as one engine request and turns what comes back into pieces.

    Raises ApiError 400 at construction when a prompt does not fit the model's context.

    arrived: `time.perf_counter()` when the request came in.

    Attributes:
      id: of the API request; engine requests are `<id>-<prompt index>`.
      prompt_logprobs: of each prompt, once its first piece is there and if they were asked for.
    """

    def __init__(
        self,
        request_id: str,
        request: ChatRequest | CompletionRequest,
        model: ServedModel,
        prompts: Sequence[Prompt],
        metrics: ModelMetrics,
        arrived: float,
    ) -> None:
        self.id = request_id
        self.model = model
        self.prompts = prompts
        self.n = request.n
        self.choices = [Choice(index, request, model) for index in range(len(prompts) * request.n)]
        self.prompt_logprobs: list[list[TokenLogprobs | None] | None] = [None] * len(prompts)
        self.num_cached_tokens = 0
        self._sampling = [sampling_params(request, model, len(prompt.token_ids)) for prompt in prompts]
        lengths = [len(prompt.token_ids) for prompt in prompts]
        self._clock = metrics.start(arrived, lengths, request.n, self._sampling[0].max_tokens)

    @property
    def usage(self) -> dict[str, object]:
        """Tokens so far, as `Usage`."""
        return self.usage_of(range(len(self.choices)))

    def usage_of(self, indices: Sequence[int]) -> dict[str, object]:
        """Tokens so far of some choices and of the prompts they answer."""
        prompts = {index // self.n for index in indices}
        num_prompt = sum(len(self.prompts[prompt].token_ids) for prompt in prompts)
        num_completion = sum(self.choices[index].num_tokens for index in indices)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_completion,
            "total_tokens": num_prompt + num_completion,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Pieces of all choices as they come, until all have finished. Closing it aborts what still runs.

        Raises what `EngineClient.generate` raises.
        """
        sources = [self._pieces_of(prompt) for prompt in range(len(self.prompts))]
        with self._clock:
            async with aclosing(sources[0] if len(sources) == 1 else _merged(sources)) as pieces:
                async for piece in pieces:
                    yield piece

    async def _pieces_of(self, prompt: int) -> AsyncGenerator[Piece, None]:
        unfinished = self.n
        async with aclosing(self._deltas_of(prompt, self._sampling[prompt])) as deltas:
            async for delta in deltas:
                choice = self.choices[prompt * self.n + delta.index]
                if choice.is_finished:
                    continue
                if delta.offset == 0:
                    self._note_first(prompt, delta)
                piece = choice.push(delta)
                self._clock.tick(choice.index, choice.num_tokens, piece.finish_reason)
                yield piece
                if choice.is_finished:
                    unfinished -= 1
                    if not unfinished:
                        return

    async def _deltas_of(self, prompt: int, sampling: SamplingParams) -> AsyncGenerator[TokenDelta, None]:
        """The engine's deltas. Those of other choices wait until choice 0 has brought the prompt's logprobs."""
        held: list[TokenDelta] | None = [] if sampling.prompt_logprobs is not None and self.n > 1 else None
        asked = self.prompts[prompt]
        stream = self.model.engine.generate(f"{self.id}-{prompt}", asked.token_ids, sampling, self.n, asked.images)
        async with aclosing(stream) as deltas:
            async for delta in deltas:
                if delta.finish_reason == "abort":
                    raise EngineUnavailable(f"The engine of {self.model.id!r} gave up the request")
                if held is not None and delta.index:
                    held.append(delta)
                    continue
                yield delta
                if held is not None:
                    for late in held:
                        yield late
                    held = None

    def _note_first(self, prompt: int, delta: TokenDelta) -> None:
        if delta.index == 0:
            self.num_cached_tokens += delta.num_cached_tokens
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs[prompt] = delta.prompt_logprobs


async def _merged(sources: Sequence[AsyncGenerator[Piece, None]]) -> AsyncGenerator[Piece, None]:
    """Items of all `sources` as they come. The first error ends them all; so does closing this."""
    arrived: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()

    async def drain(source: AsyncGenerator[Piece, None]) -> None:
        try:
            async with aclosing(source):
                async for piece in source:
                    arrived.put_nowait(piece)
            arrived.put_nowait(None)
        except Exception as error:
            arrived.put_nowait(error)

    tasks = [asyncio.ensure_future(drain(source)) for source in sources]
    try:
        running = len(tasks)
        while running:
            item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
