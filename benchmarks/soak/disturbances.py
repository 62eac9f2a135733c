"""What is done to expert servers, and how long the directory takes until every expert has its copies again."""

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from benchmarks.soak.target import Server, Target
from cluster.network import Host

CUT_SECONDS = 10.0
"""How long a link is cut: the directory drops a server after three, and the others load its experts in some more.
Ray gives a node up after 15 or more, which is the death of a host rather than of its link."""
SLOW_SECONDS, SLOW_RATE = 10.0, "256kbit"
"""A step's rows for one server and layer are some 5 kB, which take 0.15 s then, those of a prompt 0.5 s. Heartbeats and
what Ray sends are small enough to come through: nobody takes the host for dead."""
LOOK_SECONDS = 7.0
"""Before a disturbance is due its server is chosen: one that is frozen meanwhile delays the answer by five."""
RESTORE_SECONDS, ASK_SECONDS = 60.0, 5.0
"""Not more often than Prometheus would: gathering the metrics takes a tenth of a second of these CPUs."""


@dataclass(frozen=True)
class Kind:
    """run: does it to a server. spares: addresses of hosts whose servers it does not touch. drops: whether the
    directory is to drop the server, and others to load its experts."""

    name: str
    run: Callable[[Server], None]
    spares: Callable[[Target], set[str]] = lambda _target: set()
    drops: bool = True


KILL = Kind("kill", lambda server: os.kill(server.pid, signal.SIGKILL))
STOP = Kind("stop", lambda server: os.kill(server.pid, signal.SIGSTOP))


def cut(hosts: Sequence[Host], head: Host) -> Kind:
    """A host's link, for CUT_SECONDS."""

    def run(host: Host) -> None:
        host.cut()
        threading.Timer(CUT_SECONDS, host.restore).start()

    return _of_link("cut", hosts, head, run)


def slow(hosts: Sequence[Host], head: Host) -> Kind:
    """A host's link, for SLOW_SECONDS, after which `run` returns."""

    def run(host: Host) -> None:
        host.slow(SLOW_RATE)
        time.sleep(SLOW_SECONDS)
        host.unslow()

    return _of_link("slow", hosts, head, run, drops=False)


def _of_link(name: str, hosts: Sequence[Host], head: Host, run: Callable[[Host], None], drops: bool = True) -> Kind:
    """Those of the head, of engines and of fronts are left alone: experts only."""
    by_address = {host.address: host for host in hosts}
    return Kind(
        name,
        run=lambda server: run(by_address[server.host]),
        spares=lambda target: target.hosts_of_the_rest() | {head.address},
        drops=drops,
    )


@dataclass
class Disturbances:
    """One of `kinds` in turn every so many seconds, `number` times.

    happened: kind, server and time of each. failovers: of each, calls that its server did not answer in time. restored:
    seconds after each that has its server dropped until a table named that no more, and had two copies of everything.
    """

    kinds: Sequence[Kind]
    number: int
    every: float = 20.0
    happened: list[tuple[str, Server, float]] = field(default_factory=list)
    failovers: list[int] = field(default_factory=list)
    restored: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return self.number * self.every

    def run(self, target: Target) -> None:
        begun = time.perf_counter()
        for round_ in range(self.number):
            due = begun + self.every * (round_ + 0.5)
            _sleep_until(due - LOOK_SECONDS)
            kind = self.kinds[round_ % len(self.kinds)]
            spared = kind.spares(target)
            servers = [server for server in target.servers() if server.host not in spared]
            victim = servers[round_ % len(servers)]
            _sleep_until(due)
            before = target.failovers(victim)
            self.happened.append((kind.name, victim, time.perf_counter()))
            kind.run(victim)
            if kind.drops:
                self.restored.append(_restored(target, victim))
            self.failovers.append(target.failovers(victim) - before)

    def after(self, moment: float) -> str:
        """What happened last before `moment`, and how long before: "kill + 0.3 s"."""
        before = [(kind, at) for kind, _, at in self.happened if at <= moment]
        return f"{before[-1][0]} + {moment - before[-1][1]:.1f} s" if before else "before all"


def _restored(target: Target, victim: Server) -> float:
    """Asks again without waiting for the answer before: metrics wait five seconds for a silent replica, but say how it
    was when they were asked for."""
    begun = time.perf_counter()
    asked: dict[Future[float], float] = {}
    with ThreadPoolExecutor() as pool:
        while (seconds := time.perf_counter() - begun) < RESTORE_SECONDS:
            asked[pool.submit(target.copies_without, victim.id)] = seconds
            time.sleep(ASK_SECONDS)
            for answer in [answer for answer in asked if answer.done()]:
                if answer.result() >= 2:
                    return asked[answer]
                del asked[answer]
    return float("inf")


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.perf_counter()))
