"""A server under measurement: the process that starts it and every process that came of it.

Processes are recognised by a marker in their environment, which children inherit even when
they are daemons (Ray's are), or by having such a parent: a process that sets its own title
(vLLM's and Ray's workers) overwrites its environment. That makes memory and CPU figures
complete, and lets a server be stopped without a trace.
"""

import contextlib
import os
import secrets
import signal
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

MARKER = "BENCHMARK_SERVER"


class ServerFailed(Exception):
    """The server ended, or did not answer in time. The message says where its log is."""


@dataclass(frozen=True)
class Launch:
    """How to start a server. `stop` is a command that ends it in an orderly way; none means a signal."""

    name: str
    model: str
    base_url: str
    command: tuple[str, ...]
    environment: dict[str, str]
    folder: Path
    stop: tuple[str, ...] = ()


class Server:
    """A started server. `log` takes all its output."""

    def __init__(self, launch: Launch, log: Path) -> None:
        if answers(launch.base_url):
            raise ServerFailed(f"something already answers at {launch.base_url}; stop it first")
        self.launch, self.log = launch, log
        self._marker = f"{MARKER}={secrets.token_hex(8)}"
        name, _, value = self._marker.partition("=")
        self._environment = os.environ | launch.environment | {name: value}
        self.started = time.perf_counter()
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                launch.command,
                env=self._environment,
                cwd=launch.folder,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._known = {self._process.pid}

    def wait_until_ready(self, timeout: float = 300) -> float:
        """Seconds from start until `/v1/models` answered. Polls every 50 ms."""
        while not answers(self.launch.base_url):
            if self._process.poll() is not None:
                raise ServerFailed(f"{self.launch.name} ended with {self._process.returncode}: see {self.log}")
            if time.perf_counter() - self.started > timeout:
                raise ServerFailed(f"{self.launch.name} did not answer within {timeout:.0f} s: see {self.log}")
            time.sleep(0.05)
        return time.perf_counter() - self.started

    def processes(self) -> set[int]:
        """Process ids of the whole server. One seen once stays known after its parent has gone."""
        parents = {pid: parent for pid in _pids() if (parent := _parent(pid)) is not None}
        self._known &= set(parents)
        found = {pid for pid in parents if pid in self._known or self._is_marked(pid)}
        while more := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= more
        self._known = found
        return found

    def _is_marked(self, pid: int) -> bool:
        with contextlib.suppress(OSError):
            return self._marker.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return False

    def memory(self) -> "Memory":
        readings = [_memory(pid) for pid in self.processes()]
        return Memory(sum(rss for rss, _ in readings), sum(pss for _, pss in readings), len(readings))

    def cpu_seconds(self) -> float:
        """CPU time, user and system, of all live processes so far."""
        return sum(_cpu_seconds(pid) for pid in self.processes())

    def stop(self) -> None:
        """Ends every process of the server: first as it asks to be ended, then by force."""
        if self.launch.stop:
            subprocess.run(self.launch.stop, env=self._environment, cwd=self.launch.folder, check=False, timeout=60)
        for chosen, patience in ((signal.SIGINT, 15.0), (signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, chosen)
            deadline = time.perf_counter() + patience
            while self.processes() and time.perf_counter() < deadline:
                self._process.poll()
                time.sleep(0.1)
        self._process.wait(timeout=10)


@dataclass(frozen=True)
class Memory:
    """Bytes over all processes. `pss` counts a page shared by n processes as 1/n in each."""

    rss: int
    pss: int
    num_processes: int


def answers(base_url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{base_url}/v1/models", timeout=2) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def machine_cpu_seconds() -> float:
    """CPU time that anything on this machine has used, over all CPUs (user, nice, system, irq, softirq)."""
    user, nice, system, _idle, _iowait, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _stat(pid: int) -> list[str] | None:
    """Fields of `/proc/<pid>/stat` from the state on, or None when the process is gone or a zombie."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else fields
    return None


def _parent(pid: int) -> int | None:
    fields = _stat(pid)
    return None if fields is None else int(fields[1])


def _memory(pid: int) -> tuple[int, int]:
    figures = {"Rss": 0, "Pss": 0}
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
            name, _, value = line.partition(":")
            if name in figures:
                figures[name] = int(value.split()[0]) * 1024
    return figures["Rss"], figures["Pss"]


def _cpu_seconds(pid: int) -> float:
    fields = _stat(pid)
    return 0.0 if fields is None else (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
