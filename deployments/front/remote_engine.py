"""An engine behind a Serve handle.

A request is one unary Serve call that lives as long as the request, so that Serve counts it,
drains it and raises when the engine dies; its tokens arrive in the front's `Mailbox`.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from deployments.engine.request import (
    EngineRequest,
    PromptImage,
    QueueFull,
    RequestTooLong,
    SamplingParams,
    TokenDelta,
)
from deployments.front.engine_client import EngineFailure, EngineUnavailable
from deployments.front.mailbox import DeltaQueue, Mailbox

LATE_TOKENS_SECONDS = 10.0
"""How long after its call's end a request's last tokens may arrive."""

HEALTH_SECONDS = 5.0


class RemoteEngine:
    """An engine deployment behind a Serve handle."""

    def __init__(self, model: str, handle: Any, mailbox: Mailbox) -> None:
        self._model = model
        self._handle = handle
        self._mailbox = mailbox
        self._ending: set[asyncio.Future[None]] = set()

    async def generate(
        self, request_id: str, prompt: list[int], sampling: SamplingParams, n: int, images: tuple[PromptImage, ...] = ()
    ) -> AsyncGenerator[TokenDelta, None]:
        """See `EngineClient.generate`."""
        with self._mailbox.open(request_id) as deltas:
            request = EngineRequest(request_id, prompt, sampling, self._mailbox.address, n, images)
            call = asyncio.ensure_future(self._call(request, deltas))
            try:
                unfinished = n
                while unfinished:
                    delta = await deltas.get()
                    unfinished -= delta.finish_reason is not None
                    yield delta
            finally:
                if unfinished:
                    call.cancel()
                else:
                    # The call ends by itself in a moment; nobody needs to wait for it.
                    self._ending.add(call)
                    call.add_done_callback(self._ending.discard)

    async def _call(self, request: EngineRequest, deltas: DeltaQueue) -> None:
        """Cancelling this cancels the Serve call, which aborts the request in the engine."""
        response = self._handle.generate.remote(request)
        try:
            await response
            lost = EngineFailure(f"Tokens of {self._model!r} were lost on their way")
            asyncio.get_running_loop().call_later(LATE_TOKENS_SECONDS, deltas.fail, lost)
        except asyncio.CancelledError:
            response.cancel()
            raise
        except Exception as error:
            deltas.fail(self._translate(error))

    def _translate(self, error: Exception) -> Exception:
        cause = getattr(error, "cause", error)
        if isinstance(cause, QueueFull | RequestTooLong):
            return cause
        if isinstance(error, BackPressureError):
            return QueueFull(0, 1.0)
        if isinstance(error, RayActorError | DeploymentUnavailableError):
            return EngineUnavailable(f"The engine of {self._model!r} is not available ({type(cause).__name__})")
        return EngineFailure(f"The engine of {self._model!r} failed: {type(cause).__name__}: {cause}")

    async def is_healthy(self) -> bool:
        with suppress(Exception):
            async with asyncio.timeout(HEALTH_SECONDS):
                await self._handle.describe.remote()
            return True
        return False
