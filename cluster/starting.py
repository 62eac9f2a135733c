"""What a process that starts is busy with, or waits for: in its log, and for all to see until it is ready.

The last line that this package's loggers wrote is the phase. It is kept in Ray's key-value store, since a process
that starts answers no calls yet; one that dies there is forgotten after a while.
"""

import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import msgspec
import ray
from ray.experimental import internal_kv

PACKAGES = ("model", "cluster", "deployments")
_STORE = "moray-starting"
REFRESH_SECONDS = 2.0
STALE_SECONDS = 10.0
"""After so long without a sign the process is taken for dead, or for frozen."""


@dataclass(frozen=True)
class Phase:
    """process: of whom. begun, told: when the process was started, and when it told this last; Unix time."""

    process: str
    pid: int
    host: str
    phase: str
    begun: float
    told: float

    @property
    def seconds(self) -> float:
        """Since the process was started."""
        return self.told - self.begun


class Starting(logging.Handler):
    """From construction until `ready` this process's log lines are phases of `process`, a name for people.

    Outside Ray they only go to the log.
    """

    def __init__(self, process: str) -> None:
        super().__init__(logging.INFO)
        self.process, self._begun, self._phase = process, time.time(), "starting"
        self._is_over, self._wake = False, threading.Event()
        for package in PACKAGES:
            logging.getLogger(package).addHandler(self)
        if internal_kv._internal_kv_initialized():
            self._host = ray.util.get_node_ip_address()
            threading.Thread(target=self._tell, name="starting", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        self._phase = record.getMessage()
        self._wake.set()

    def ready(self) -> None:
        """Nothing is waited for any more."""
        for package in PACKAGES:
            logging.getLogger(package).removeHandler(self)
        self._is_over = True
        self._wake.set()

    def _tell(self) -> None:
        while not self._is_over:
            self._wake.clear()
            phase = Phase(self.process, os.getpid(), self._host, self._phase, self._begun, time.time())
            internal_kv._internal_kv_put(self.process, msgspec.json.encode(asdict(phase)), namespace=_STORE)
            self._wake.wait(REFRESH_SECONDS)
        internal_kv._internal_kv_del(self.process, namespace=_STORE)


def phases() -> list[Phase]:
    """Of all processes of this cluster that start, by name."""
    keys = sorted(internal_kv._internal_kv_list("", namespace=_STORE))
    values = [internal_kv._internal_kv_get(key, namespace=_STORE) for key in keys]
    told = [msgspec.json.decode(value, type=Phase) for value in values if value is not None]
    return [phase for phase in told if time.time() - phase.told < STALE_SECONDS]


def log_to(handlers: Sequence[logging.Handler]) -> None:
    """What this package's loggers tell, from INFO on, goes to `handlers` and nowhere else."""
    for package in PACKAGES:
        logger = logging.getLogger(package)
        logger.setLevel(logging.INFO)
        logger.handlers, logger.propagate = list(handlers), False
