"""Whether an engine's ranks and experts answer: a probe between two steps, for as many as ask meanwhile."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

GOOD_FOR_SECONDS = 1.0
"""So long an answer is given again: a probe keeps the next step waiting, and anyone may ask."""


class Readiness:
    """probe: raises what is wrong. `ask` is for any thread, `answer` and `refuse` for the one that computes."""

    def __init__(self, probe: Callable[[], None]) -> None:
        self._probe = probe
        self._lock = threading.Lock()
        self._asking: list[Future[None]] = []
        self._fault: BaseException | None = None
        self._probed = float("-inf")

    @property
    def is_asked(self) -> bool:
        return bool(self._asking)

    def ask(self) -> Future[None]:
        """Done when all have answered; raises what kept them from it."""
        asked: Future[None] = Future()
        with self._lock:
            if time.monotonic() - self._probed > GOOD_FOR_SECONDS:
                self._asking.append(asked)
            else:
                _settle(asked, self._fault)
        return asked

    def answer(self) -> None:
        """Probes, if anybody asks."""
        if not self._asking:
            return
        fault: BaseException | None = None
        try:
            self._probe()
        except Exception as error:
            fault = error
        self._answer(fault)

    def refuse(self, fault: BaseException) -> None:
        """There will be no more probes."""
        self._answer(fault)

    def _answer(self, fault: BaseException | None) -> None:
        with self._lock:
            asking, self._asking = self._asking, []
            self._fault, self._probed = fault, time.monotonic()
        for asked in asking:
            _settle(asked, fault)


def _settle(asked: "Future[None]", fault: BaseException | None) -> None:
    if not asked.set_running_or_notify_cancel():
        return
    if fault is None:
        asked.set_result(None)
    else:
        asked.set_exception(fault)
