"""A server's life with the directory: heartbeats, and holding what the directory assigns.

Loading goes on in a thread of its own, and pauses while others are answered, so that moving copies does not slow
them down much. A copy that is no longer assigned is kept until no table names it, and a little longer, for
clients that have not switched yet.
"""

import asyncio
import logging
import threading
import time
from collections import Counter

from cluster.experts.directory import HEARTBEAT_SECONDS
from cluster.experts.server import ExpertServer
from cluster.experts.table import Assignment, DirectoryClient, Report, Unit
from cluster.experts.weights import HeldExperts

logger = logging.getLogger(__name__)

DROP_AFTER_SECONDS = 2.0
REPORT_TIMEOUT_SECONDS = 5.0


class Membership:
    """Keeps `server` known to the directory, from `start` to `leave`.

    memory: bytes for experts; None for any number.
    """

    def __init__(
        self, server: ExpertServer, experts: HeldExperts, directory: DirectoryClient, memory: int | None = None
    ) -> None:
        self._server, self._experts, self._directory = server, experts, directory
        self._max_units = None if memory is None else memory // experts.bytes_per_unit()
        self._wanted: frozenset[Unit] = frozenset()
        self._assignment = Assignment(frozenset(), frozenset())
        self._named_until: dict[Unit, float] = {}
        self._reported: Counter[Unit] = Counter()
        self._is_leaving = self._ended = False
        self.error: str | None = None
        """Why the server cannot hold what it should, if so."""
        self._wake = threading.Event()
        self._threads = [
            threading.Thread(target=lambda: asyncio.run(self._beat()), name="expert-heartbeat", daemon=True),
            threading.Thread(target=self._load, name="expert-loading", daemon=True),
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def leave(self, timeout: float) -> bool:
        """Returns when no table names this server any more, or False after `timeout` seconds."""
        self._is_leaving = True
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if not self._assignment.named and not self._assignment.hold and not self._named_until:
                break
            time.sleep(0.1)
        left = not self._named_until
        self.stop()
        return left

    def stop(self) -> None:
        self._ended = True
        self._wake.set()

    @property
    def epoch(self) -> int:
        """Of the last table that the directory told of."""
        return self._assignment.epoch

    async def _beat(self) -> None:
        failing = False
        while not self._ended:
            begun = time.monotonic()
            try:
                async with asyncio.timeout(REPORT_TIMEOUT_SECONDS):
                    self._obey(await self._report())
                if failing:
                    logger.info("the directory answers again")
                failing = False
            except Exception as error:
                if not failing:
                    logger.warning("the directory does not answer, serving goes on: %r", error)
                failing = True
            await asyncio.sleep(max(0.0, begun + HEARTBEAT_SECONDS - time.monotonic()))

    async def _report(self) -> Assignment:
        now = self._server.rows
        rows = {unit: count - self._reported[unit] for unit, count in now.items() if count > self._reported[unit]}
        report = Report(self._server.address, self._experts.units, rows, self._max_units, self._is_leaving)
        assignment = await self._directory.report(report)
        self._reported = now
        return assignment

    def _obey(self, assignment: Assignment) -> None:
        now = time.monotonic()
        self._assignment = assignment
        for unit in assignment.named:
            self._named_until[unit] = now + DROP_AFTER_SECONDS
        self._named_until = {unit: until for unit, until in self._named_until.items() if until > now}
        for unit in self._experts.units - assignment.hold - self._named_until.keys():
            self._experts.drop(unit)
        if assignment.hold != self._wanted:
            self._wanted = assignment.hold
            self._wake.set()

    def _load(self) -> None:
        while not self._ended:
            self._wake.wait()
            self._wake.clear()
            begun, loaded = time.monotonic(), 0
            while not self._ended and (missing := sorted(self._wanted - self._experts.units)):
                started, answered = time.monotonic(), self._server.calls
                try:
                    self._experts.load(missing[0])
                    loaded += 1
                    self.error = None
                    if self._server.calls > answered:
                        # Half of the time is for the thread that answers. With less priority instead, this one would
                        # be kept waiting while it has the interpreter's lock, and the other for that.
                        time.sleep(time.monotonic() - started)
                except Exception as error:
                    self.error = f"cannot load expert {missing[0][1]} of layer {missing[0][0]}: {error}"
                    logger.exception(self.error)
                    time.sleep(1.0)
            if loaded:
                logger.info(
                    "loaded %d experts in %.1f s, holds %d", loaded, time.monotonic() - begun, len(self._wanted)
                )
