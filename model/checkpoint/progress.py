"""Shows that a long load goes on: a bar on a terminal, log lines elsewhere. A short one shows nothing."""

import logging
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

logger = logging.getLogger(__name__)

QUIET_SECONDS = 2.0
LOG_SECONDS = 10.0


class LoadingProgress:
    """Bytes done out of `total`. With `visible` false it does nothing: of several ranks one speaks."""

    def __init__(self, total: int, *, visible: bool = True) -> None:
        self._total = total
        self._visible = visible
        self._done = 0
        self._begin = self._logged = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> "LoadingProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, num_bytes: int) -> None:
        self._done += num_bytes
        now = time.monotonic()
        if not self._visible or now - self._begin < QUIET_SECONDS:
            return
        if sys.stderr.isatty():
            self._draw()
        elif now - self._logged >= LOG_SECONDS:
            self._logged = now
            logger.info(
                "Loading weights: %.1f of %.1f GB (%d%%)",
                self._done / 1e9,
                self._total / 1e9,
                100 * self._done // self._total,
            )

    def _draw(self) -> None:
        if self._bar is None:
            columns = (TextColumn("Loading weights"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
            self._bar.add_task("", total=self._total)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=self._done)
