"""Tells fronts that this engine's process lives, also while a step takes long.

A process that is frozen, or whose host is gone, falls silent; Ray would need 15 to 50 seconds to notice.
Whether steps go on is not said here: an engine whose steps fail or end says so to Serve (`check_health`).
"""

import logging
import threading
from collections.abc import Callable, Iterable

from cluster.channel import Address
from deployments.engine.mailing import Mailing

logger = logging.getLogger(__name__)

BEAT_SECONDS = 0.5


class Heartbeat:
    """Sends an empty message to each of `fronts()` every `BEAT_SECONDS`, from a thread of its own, until `stop`."""

    def __init__(self, engine: str, fronts: Callable[[], Iterable[Address]]) -> None:
        self._engine, self._fronts = engine, fronts
        self._stopping = threading.Event()
        threading.Thread(target=self._run, name="engine-heartbeat", daemon=True).start()

    def stop(self) -> None:
        self._stopping.set()

    def _run(self) -> None:
        mailing = Mailing(self._engine)
        while not self._stopping.wait(BEAT_SECONDS):
            try:
                mailing.send({front: [] for front in self._fronts()})
            except Exception:  # without a heartbeat every front would leave this engine
                logger.exception("A heartbeat was not sent")
        mailing.close()
