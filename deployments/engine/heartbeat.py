"""Tells fronts that this engine's process lives, also while a step takes long, and notices when theirs does not.

A process that is frozen, or whose host is gone, falls silent; Ray would need 15 to 50 seconds to notice.
Whether steps go on is not said here: an engine whose steps fail or end says so to Serve (`check_health`).
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable

from cluster.channel import Address
from deployments.engine.mailing import Mailing

logger = logging.getLogger(__name__)

BEAT_SECONDS = 0.5
LOST_AFTER_SECONDS = 1.5
"""A front without a connection for so long is taken for dead. A killed one loses it at once, a frozen or unreachable
one after three seconds."""


class Heartbeat:
    """Sends an empty message to each of `fronts()` every `BEAT_SECONDS`, from a thread of its own, until `stop`.

    on_lost: called with a front that cannot be reached, for as long as it is one of `fronts()`.
    """

    def __init__(
        self, engine: str, fronts: Callable[[], Iterable[Address]], on_lost: Callable[[Address], None]
    ) -> None:
        self._engine, self._fronts, self._on_lost = engine, fronts, on_lost
        self._cut_since: dict[Address, float] = {}
        self._stopping = threading.Event()
        threading.Thread(target=self._run, name="engine-heartbeat", daemon=True).start()

    def stop(self) -> None:
        self._stopping.set()

    def _run(self) -> None:
        mailing = Mailing(self._engine, is_watched=True)
        while not self._stopping.wait(BEAT_SECONDS):
            try:
                self._beat(mailing, set(self._fronts()))
            except Exception:  # without a heartbeat every front would leave this engine
                logger.exception("A heartbeat was not sent")
        mailing.close()

    def _beat(self, mailing: Mailing, fronts: set[Address]) -> None:
        now = time.monotonic()
        mailing.send({front: [] for front in fronts})
        self._cut_since = {f: self._cut_since.get(f, now) for f in fronts if not mailing.reaches(f)}
        for front, since in self._cut_since.items():
            if now - since >= LOST_AFTER_SECONDS:
                self._on_lost(front)
