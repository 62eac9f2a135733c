"""Notices that an engine is dead or frozen, and ends what waits for it.

Three sources: Serve's router, which sees connections break; the engines' own messages and heartbeats, whose
absence tells of a frozen process or a lost host; and the calls themselves, which raise. An engine that one
of them accuses gets no new request until it answers a call again.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import Context
from dataclasses import dataclass, field

from deployments.front.mailbox import DeltaQueue, Mailbox
from deployments.front.replay import EngineLost
from deployments.front.roster import Roster

logger = logging.getLogger(__name__)

CHECK_SECONDS = 0.1
PROBE_SECONDS = 2.0
SILENT = "fell silent"
"""The reason for suspicion that may prove wrong; others are told by Serve or by the engine itself."""
STOPPING = "is stopping"


@dataclass(eq=False)
class Attempt:
    """A request at an engine. load: see `placement.work`. begun: on the monotonic clock.

    is_drained: Serve sends the engine no new requests, though nothing is wrong with it; Serve kills it when it has
    not finished in time.
    """

    engine: str
    load: int
    deltas: DeltaQueue
    begun: float = field(default_factory=time.monotonic)
    is_drained: bool = False


class Liveness:
    """Watches the attempts of one front at the engines of one deployment.

    probe: asks an engine whether it lives; raises if it does not answer.
    heartbeat_timeout_s: a longer silence makes an engine suspect. patience_s: even an engine that is the only one is
    left after so long a silence.
    """

    def __init__(
        self,
        roster: Roster,
        mailbox: Mailbox,
        probe: Callable[[str], Awaitable[None]],
        heartbeat_timeout_s: float,
        patience_s: float,
    ) -> None:
        self._roster, self._mailbox, self._probe = roster, mailbox, probe
        self._timeout, self._patience = heartbeat_timeout_s, patience_s
        self._attempts: set[Attempt] = set()
        self._probing: dict[str, asyncio.Task[None]] = {}
        self._checking: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to watch, in the running event loop but no request's context; called again it does nothing."""
        if self._checking is None:
            self._checking = asyncio.get_running_loop().create_task(self._check(), context=Context())

    def outstanding(self, engine: str) -> int:
        """Tokens that this front's requests leave an engine to compute."""
        return sum(attempt.load for attempt in self._attempts if attempt.engine == engine)

    @contextmanager
    def watched(self, attempt: Attempt) -> Iterator[Attempt]:
        """Meanwhile the attempt's deltas fail with EngineLost when its engine is found dead or silent."""
        self._attempts.add(attempt)
        try:
            yield attempt
        finally:
            self._attempts.discard(attempt)

    def suspect(self, engine: str, why: str) -> None:
        self._roster.suspects[engine] = why

    async def _check(self) -> None:
        last = time.monotonic()
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            now, before = time.monotonic(), last
            last = now
            if now - before > self._timeout / 2:
                continue  # this process itself stood still: what it has heard meanwhile is yet to be read
            try:
                self._look(now)
            except Exception:  # nothing else would notice the next engine that dies
                logger.exception("Engines were not checked")

    def _look(self, now: float) -> None:
        for attempt in self._attempts:
            silence = now - max(attempt.begun, self._mailbox.heard(attempt.engine))
            self._listen(attempt, silence)
            attempt.is_drained |= is_drained(self._roster, attempt.engine)
            why = reason_to_leave(self._roster, attempt.engine, silence > self._patience)
            if why is not None:
                attempt.deltas.fail(EngineLost(f"Engine replica {attempt.engine} {why}"))
        for engine in set(self._roster.suspects) - self._probing.keys():
            self._probing[engine] = asyncio.create_task(self._until_it_answers(engine))

    def _listen(self, attempt: Attempt, silence: float) -> None:
        """Suspects an engine that has been silent, and no longer one that was and is heard again."""
        suspects, engine = self._roster.suspects, attempt.engine
        if silence > self._timeout:
            suspects.setdefault(engine, SILENT)
        elif suspects.get(engine) == SILENT and self._mailbox.heard(engine) > attempt.begun:
            del suspects[engine]

    async def _until_it_answers(self, engine: str) -> None:
        """Takes an engine off the suspects when it answers, or when Serve has given it up."""
        while engine in self._roster.replicas:
            with suppress(Exception):
                async with asyncio.timeout(PROBE_SECONDS):
                    await self._probe(engine)
                break
            await asyncio.sleep(CHECK_SECONDS)
        self._roster.suspects.pop(engine, None)
        del self._probing[engine]


def is_drained(roster: Roster, engine: str) -> bool:
    """Whether Serve or the engine itself has said that it stops, rather than anyone that it died."""
    return roster.suspects.get(engine, "" if engine in roster.replicas else STOPPING) == STOPPING


def reason_to_leave(roster: Roster, engine: str, is_hopeless: bool) -> str | None:
    """Why the requests at `engine` should go on elsewhere, if they should.

    One that is silent may only be slow: its requests stay while there is no other engine to go to and hope is left.
    """
    why = roster.suspects.get(engine)
    if why == SILENT and not roster.trusted and engine in roster.replicas and not is_hopeless:
        return None
    return why
