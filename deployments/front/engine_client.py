"""How the front sees an engine, and what it raises. Tests inject a fake of it."""

from collections.abc import AsyncGenerator
from typing import Protocol

from deployments.engine.request import PromptImage, SamplingParams, TokenDelta


class EngineUnavailable(Exception):
    """No engine is there, or it died: another try may succeed."""


class EngineFailure(Exception):
    """The engine raised: a fault of the server."""


class EngineClient(Protocol):
    """Generates with one model, on whichever of its engines."""

    def generate(
        self, request_id: str, prompt: list[int], sampling: SamplingParams, n: int, images: tuple[PromptImage, ...] = ()
    ) -> AsyncGenerator[TokenDelta, None]:
        """Deltas of all `n` choices, in order within each; ends when all have finished. An engine that dies
        meanwhile is replaced by another, and the deltas go on.

        Closing it aborts the request. Raises QueueFull, EngineUnavailable or EngineFailure.
        """
        ...

    async def faults(self) -> list[str]:
        """What keeps engines, their ranks or experts from answering, one for each engine; empty when all answer."""
        ...
