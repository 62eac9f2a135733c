"""Notices at once when a process on this host has ended."""

import contextlib
import os
import select
import signal
import threading
from collections.abc import Callable, Mapping

POLL_MS = 200


class Watch:
    """Calls `on_death(rank, pid)` once, from a thread of its own, for the first of `pids` (by rank) that ends."""

    def __init__(self, pids: Mapping[int, int], on_death: Callable[[int, int], None]) -> None:
        self._on_death, self._stopping = on_death, threading.Event()
        self._pids, self._descriptors = dict(pids), {}
        for rank, pid in pids.items():
            with contextlib.suppress(ProcessLookupError):
                self._descriptors[os.pidfd_open(pid)] = rank
        self._gone = [rank for rank in pids if rank not in self._descriptors.values()]
        threading.Thread(target=self._run, name="watch-ranks", daemon=True).start()

    def stop(self) -> None:
        """Nothing is noticed any more."""
        self._stopping.set()

    def kill(self) -> None:
        """SIGKILL to all of them that live: whoever is frozen would not end by itself."""
        for descriptor in self._descriptors:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)

    def _run(self) -> None:
        poll = select.poll()
        for descriptor in self._descriptors:
            poll.register(descriptor, select.POLLIN)
        while not self._stopping.is_set():
            dead = self._gone or [self._descriptors[descriptor] for descriptor, _ in poll.poll(POLL_MS)]
            if dead and not self._stopping.is_set():
                self._on_death(dead[0], self._pids[dead[0]])
                return
