"""Which processes belong to a run, and ending exactly those.

A run is its directory. Its processes inherit an environment variable that names it, and
those that overwrite their environment to show a title (Ray's workers do) have log files
in it open for writing. So they are found even when their parents are gone, and no other
process is ever touched.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

VARIABLE = "MORAY_RUN"
"""The environment variable; its value is the run's directory."""
POLL_SECONDS = 0.02

NEWCOMERS_NICENESS = 10
"""Of workers that start: they import for seconds, and others serve on the same CPUs. `serve_first` ends it."""
_CAP_SYS_NICE = 23
SWITCH_INTERVAL = 5e-5
"""Seconds after which a thread that runs Python yields to one that waits. Python's 5 ms would stall whoever computes or
answers, once a layer, while metrics are gathered."""


def start_as_newcomers(parent: int) -> None:
    """What process `parent` starts from now on is less urgent than what serves; so is `parent` itself.

    Nothing where processes may not take it back, as a user's and most containers' may not.
    """
    if may_be_urgent():
        _set_niceness(parent, NEWCOMERS_NICENESS)


def serve_first() -> None:
    """This process has started: its threads, and those they start, have the priority of those that serve, and none of
    them keeps the interpreter from the others for long."""
    _set_niceness(os.getpid(), 0)
    sys.setswitchinterval(SWITCH_INTERVAL)


def may_be_urgent() -> bool:
    """Whether this process, and those it starts, may lower their niceness again."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("CapEff:")[2].split()[0], 16) >> _CAP_SYS_NICE & 1 == 1


def _set_niceness(process: int, niceness: int) -> None:
    for thread in os.listdir(f"/proc/{process}/task"):
        with contextlib.suppress(OSError):  # it is gone, or not allowed: then it was not a newcomer's either
            os.setpriority(os.PRIO_PROCESS, int(thread), niceness)


def of_run(directory: Path) -> list[psutil.Process]:
    """Living processes of the run."""
    return [process for process in psutil.process_iter() if _is_of_run(process, directory)]


def end(directory: Path, grace_s: float = 1.0) -> None:
    """Ends every process of the run: SIGTERM, after `grace_s` seconds SIGKILL."""
    processes = of_run(directory)
    for process in _each_alive(processes):
        process.terminate()
    wait(processes, grace_s)
    stubborn = of_run(directory)
    for process in _each_alive(stubborn):
        process.kill()
    wait(stubborn, grace_s)


def wait(processes: list[psutil.Process], seconds: float) -> bool:
    """Whether all have ended, as soon as they have, or after `seconds`.

    A zombie has ended. psutil alone would wait until its parent, or init, takes notice, which may be never.
    """
    deadline = time.monotonic() + seconds
    while True:
        _, left = psutil.wait_procs(processes, timeout=0)  # takes notice of our own children
        if not any(map(_is_alive, left)):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)


def _is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def _is_of_run(process: psutil.Process, directory: Path) -> bool:
    with contextlib.suppress(psutil.Error):
        if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
            return False
        if process.environ().get(VARIABLE) == str(directory):
            return True
        return any(file.path.startswith(f"{directory}/") and file.mode != "r" for file in process.open_files())
    return False


def _each_alive(processes: list[psutil.Process]) -> Iterator[psutil.Process]:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            yield process
