"""The engines of one deployment, behind a Serve handle.

A request is one unary Serve call that lives as long as the request, so that Serve counts it,
drains it and raises when the engine dies; its tokens arrive in the front's `Mailbox`. When an
engine is lost, the request goes on at another with the tokens so far.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from contextvars import Context
from dataclasses import replace
from itertools import count
from typing import Any

from deployments.broadcast import ask_all
from deployments.engine.request import EngineRequest, EngineStopping, PromptImage, SamplingParams, TokenDelta
from deployments.front import placement
from deployments.front.call_errors import cause_of, told, translated
from deployments.front.engine_client import EngineUnavailable
from deployments.front.liveness import STOPPING, Attempt, Liveness
from deployments.front.mailbox import DeltaQueue, Mailbox
from deployments.front.replay import EngineLeft, EngineLost, Losses, Transcript
from deployments.front.roster import Roster

logger = logging.getLogger(__name__)

LATE_TOKENS_SECONDS = 10.0
"""How long after its call's end a request's last tokens may arrive."""

RETRY_SECONDS = 0.1
"""Between two looks for an engine, when there is none."""


class RemoteEngine:
    """An `EngineClient`.

    handle: of a deployment whose router is `EngineRouter`. roster: that router's.
    heartbeat_timeout_s: a longer silence makes an engine suspect. failover_timeout_s: how long a request waits for an
    engine, at first and whenever it has lost one.
    """

    def __init__(
        self,
        model: str,
        handle: Any,
        mailbox: Mailbox,
        roster: Roster,
        heartbeat_timeout_s: float = 3.0,
        failover_timeout_s: float = 60.0,
    ) -> None:
        self._model, self._handle, self._mailbox, self._roster = model, handle, mailbox, roster
        self._failover_timeout = failover_timeout_s
        self._liveness = Liveness(roster, mailbox, self._probe, heartbeat_timeout_s, failover_timeout_s)
        self._prefixes = placement.PrefixMemory()
        self._ending: set[asyncio.Future[None]] = set()

    async def generate(
        self, request_id: str, prompt: list[int], sampling: SamplingParams, n: int, images: tuple[PromptImage, ...] = ()
    ) -> AsyncGenerator[TokenDelta, None]:
        """See `EngineClient.generate`."""
        request = EngineRequest(request_id, prompt, sampling, self._mailbox.address, n, images)
        transcript, losses, lost_at = Transcript(n), Losses(), ""
        self._liveness.start()
        for number in count():
            engine = await self._engine_for(request, lost_at, losses)
            outputs = transcript.outputs if number else ()
            attempt = replace(request, request_id=f"{request_id}.{number}", outputs=outputs)
            try:
                async with aclosing(self._attempt(attempt, engine, transcript)) as deltas:
                    async for delta in deltas:
                        yield delta
                return
            except EngineLost as lost:
                logger.warning("%s: %s, after %d tokens", request_id, lost, transcript.num_tokens)
                losses.add(lost, transcript.num_tokens)
                lost_at = engine

    async def faults(self) -> list[str]:
        """See `EngineClient.faults`; of every engine that Serve counts as running."""
        answers = await ask_all(self._handle, "check_ready")
        if not answers:
            return ["there is none"]
        return [told(answer) for answer in answers if isinstance(answer, Exception)]

    async def _engine_for(self, request: EngineRequest, lost_at: str, losses: Losses) -> str:
        """Waits for an engine that takes requests; not `lost_at` if there is another. Raises EngineUnavailable."""
        deadline = time.monotonic() + self._failover_timeout
        while not (trusted := self._roster.trusted):
            if time.monotonic() >= deadline:
                raise EngineUnavailable(f"{losses}, and no engine took over within {self._failover_timeout:g} s")
            await asyncio.sleep(RETRY_SECONDS)
        if trusted == [lost_at]:
            # What made it lose the request may be over after a while.
            await asyncio.sleep(RETRY_SECONDS * 4**losses.num_fruitless)
        names = placement.prefixes(request.prompt, request.images) if len(trusted) > 1 else []
        candidates = [
            placement.Candidate(
                engine, self._prefixes.num_cached(engine, names), self._liveness.outstanding(engine)
            )
            for engine in trusted
            if engine != lost_at or len(trusted) == 1
        ]  # fmt: skip
        engine = placement.choose(candidates, request.request_id)
        self._prefixes.add(engine, names)
        return engine

    async def _attempt(
        self, request: EngineRequest, engine: str, transcript: Transcript
    ) -> AsyncGenerator[TokenDelta, None]:
        """What is new of the request's deltas, as far as `engine` brings them. Raises EngineLost if it does not."""
        load = placement.work(request)
        with (
            self._mailbox.open(request.request_id) as deltas,
            self._liveness.watched(Attempt(engine, load, deltas)) as attempt,
        ):
            call = asyncio.ensure_future(self._call(request, engine, deltas))
            try:
                while not transcript.is_finished:
                    delta = transcript.take(await deltas.get())
                    if delta is not None:
                        yield delta
            except EngineLost as lost:
                if attempt.is_drained:
                    raise EngineLeft(str(lost)) from lost
                raise
            finally:
                if transcript.is_finished:
                    # The call ends by itself in a moment; nobody needs to wait for it.
                    self._ending.add(call)
                    call.add_done_callback(self._ending.discard)
                else:
                    call.cancel()

    async def _call(self, request: EngineRequest, engine: str, deltas: DeltaQueue) -> None:
        """Cancelling this cancels the Serve call, which aborts the request in the engine."""
        response = self._ask(engine, "generate", request)
        try:
            await response
            lost = EngineLost(f"Tokens of engine replica {engine} were lost on their way")
            asyncio.get_running_loop().call_later(LATE_TOKENS_SECONDS, deltas.fail, lost)
        except asyncio.CancelledError:
            response.cancel()
            deltas.fail(EngineLost(f"The call of engine replica {engine} was cancelled"))
            raise
        except Exception as error:
            if isinstance(cause_of(error), EngineStopping):
                self._liveness.suspect(engine, STOPPING)
            deltas.fail(translated(error, self._model, engine))

    async def _probe(self, engine: str) -> None:
        await self._ask(engine, "check_health")

    def _ask(self, engine: str, method: str, *arguments: object) -> Any:
        """Calls in a context of its own. Serve knows a pending call by the id of the HTTP request in whose context it
        was made, and never routes the second of two with one id."""
        call = self._handle.options(session_id=engine, method_name=method).remote
        return Context().run(call, *arguments)
