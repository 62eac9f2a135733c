"""Several hosts on one machine: network namespaces, each with an address of its own, on one bridge.

Processes of a host see its network only, so links can be cut and slowed as between real hosts. Files,
memory and CPUs are shared. Needs Linux, root and iproute2. This machine is on the bridge too, as the
last address, so that tests and clients reach what the hosts serve; nothing is routed further.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import psutil

MOST_NETWORKS = 100
SECONDS = 10.0
"""For one command of iproute2, and for killed processes to go."""
_SYS = Path("/sys/class/net")
_PREFIX = "moray"


class NetworkUnavailable(Exception):
    """This machine cannot make hosts; the message says why."""


def why_not() -> str | None:
    """What this machine lacks for hosts of its own; None if nothing."""
    if not Path("/proc/self/ns/net").exists():
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [program for program in ("ip", "tc") if shutil.which(program) is None]
    return f"iproute2 is not installed: no {' and no '.join(missing)}" if missing else None


class Host:
    """One namespace. address: of its only network device, `eth0`. It is made, and taken down, by its `Network`."""

    def __init__(self, name: str, link: str, address: str) -> None:
        self.name = name
        self.address = address
        self._link = link

    def start(self, command: list[str], environment: Mapping[str, str], output: IO[bytes]) -> subprocess.Popen[bytes]:
        """Runs `command` on this host; its pid is that of `command` itself."""
        on_host = ["ip", "netns", "exec", self.name, *command]
        return subprocess.Popen(on_host, env=dict(environment), stdin=subprocess.DEVNULL, stdout=output, stderr=output)

    def pids(self) -> list[int]:
        """Of all that live on this host, whoever started them."""
        return [int(pid) for pid in _ip("netns", "pids", self.name).split()]

    def kill(self) -> None:
        """SIGKILL for every process at once, as when the power goes. Addresses and links stay."""
        deadline = time.monotonic() + SECONDS
        while (pids := self.pids()) and time.monotonic() < deadline:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)

    def cut(self) -> None:
        """From now on nothing comes in or goes out, and nobody is told: a pulled cable."""
        _ip("link", "set", self._link, "down")

    def restore(self) -> None:
        """Undoes `cut`."""
        _ip("link", "set", self._link, "up")

    def slow(self, rate: str) -> None:
        """Limits what comes in and what goes out to `rate`, as `tc` writes it ("1mbit"). Undone by `unslow`.

        A token bucket, which every kernel has: packets wait for their turn, and are dropped after a second of it.
        """
        limit = ("root", "tbf", "rate", rate, "burst", "16kb", "latency", "1s")
        _run("tc", "qdisc", "replace", "dev", self._link, *limit)
        _run("tc", "-n", self.name, "qdisc", "replace", "dev", "eth0", *limit)

    def unslow(self) -> None:
        _run("tc", "qdisc", "del", "dev", self._link, "root")
        _run("tc", "-n", self.name, "qdisc", "del", "dev", "eth0", "root")


class Network:
    """`num_hosts` hosts at 10.77.N.1 and up. A context manager that leaves nothing behind.

    N is the first that is free, so several networks can be at once. Those whose process was killed are
    taken down by the next. Raises NetworkUnavailable.
    """

    def __init__(self, num_hosts: int) -> None:
        if reason := why_not():
            raise NetworkUnavailable(reason)
        if not 1 <= num_hosts <= 250:
            raise ValueError(f"num_hosts ({num_hosts}) must be from 1 to 250")
        _take_down_orphans()
        self._number, self._bridge = _new_bridge()
        self.hosts: list[Host] = []
        try:
            _take_down_hosts(self._bridge)  # of one that did not get so far
            _ip("addr", "add", f"10.77.{self._number}.254/24", "dev", self._bridge)
            _ip("link", "set", self._bridge, "up")
            for index in range(1, num_hosts + 1):
                self.hosts.append(self._new_host(index))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Network":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kills what runs on the hosts, and takes them down. Safe to call twice."""
        _take_down(self._bridge)

    def _new_host(self, index: int) -> Host:
        name, link = f"{self._bridge}h{index}", f"{self._bridge}v{index}"
        host = Host(name, link, f"10.77.{self._number}.{index}")
        _ip("netns", "add", name)
        _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", link, "master", self._bridge, "up")
        _ip("-n", name, "addr", "add", f"{host.address}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", name, "link", "set", "eth0", "up")
        # Ray finds a node's address by asking which device would reach the internet.
        _ip("-n", name, "route", "add", "default", "via", f"10.77.{self._number}.254")
        return host


def _new_bridge() -> tuple[int, str]:
    """The first free number, and the bridge of it. Its alias is our process id."""
    for number in range(MOST_NETWORKS):
        bridge = f"{_PREFIX}{number}"
        if (_SYS / bridge).exists():
            continue
        with contextlib.suppress(NetworkUnavailable):  # another process was faster
            _ip("link", "add", bridge, "type", "bridge")
            _ip("link", "set", bridge, "alias", str(os.getpid()))
            return number, bridge
    raise NetworkUnavailable(f"cannot make a network bridge: `ip link add {_PREFIX}0 type bridge` says why")


def _take_down_orphans() -> None:
    for path in _SYS.glob(f"{_PREFIX}[0-9]*"):
        alias = path / "ifalias"
        if (path / "bridge").exists() and alias.exists():
            owner = alias.read_text().strip()
            if owner.isdigit() and not psutil.pid_exists(int(owner)):
                _take_down(path.name)


def _take_down(bridge: str) -> None:
    """Hosts first: deleting a namespace with processes in it would only take its name away. The bridge last.

    Links by name: sockets that still wait for an answer keep a namespace, and so its link, for minutes.
    """
    _take_down_hosts(bridge)
    if (_SYS / bridge).exists():
        _ip("link", "del", bridge)


def _take_down_hosts(bridge: str) -> None:
    names = [line.split()[0] for line in _ip("netns", "list").splitlines() if line.startswith(f"{bridge}h")]
    for name in names:
        Host(name, "", "").kill()
        _ip("netns", "del", name)
    for link in _SYS.glob(f"{bridge}v*"):
        with contextlib.suppress(NetworkUnavailable):  # it went with its namespace meanwhile
            _ip("link", "del", link.name)


def _ip(*arguments: str) -> str:
    return _run("ip", *arguments)


def _run(*command: str) -> str:
    """Standard output. Raises NetworkUnavailable with what the command said."""
    result = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    if result.returncode:
        raise NetworkUnavailable(f"`{' '.join(command)}`: {result.stderr.strip() or f'exit {result.returncode}'}")
    return result.stdout
