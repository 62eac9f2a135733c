"""A real Ray cluster of several hosts on one machine: a head and workers, each in a network namespace.

For tests and `make cluster-demo`. Token authentication is on, as on any network that is not loopback.
What runs is Ray as on real hosts; what differs is that the hosts share files, memory and CPUs, so
each has its own directory for sockets, logs and HAProxy's files.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from cluster import processes, serve_settings
from cluster.local import new_directory
from cluster.network import Host, Network
from cluster.node import GCS_PORT

DASHBOARD_PORT = 8265
START_SECONDS = 120.0
POLL_SECONDS = 0.1
ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    **serve_settings.SETTINGS,
}
_CLUSTER_VARIABLES = ("RAY_ADDRESS", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_AUTH_TOKEN")
"""Of another cluster, in whose processes this may run."""


class HostsFailed(Exception):
    """A host's node does not start; the message has its last words."""


class HostCluster:
    """`hosts[0]` is the head. A context manager that leaves nothing behind: no process, namespace or file.

    num_cpus: of each host, as Ray counts them. directory: of sockets and logs, until `stop`.
    Raises NetworkUnavailable, with the reason, on machines that cannot do this.
    """

    def __init__(self, num_hosts: int = 4, num_cpus: int = 2) -> None:
        self._num_cpus = num_cpus
        self._network = Network(num_hosts)
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self.directory = new_directory()
        self.hosts = self._network.hosts
        self.head = self.hosts[0]

    @property
    def environment(self) -> dict[str, str]:
        """For `serve deploy`, `serve status` and drivers."""
        mine = {name: value for name, value in os.environ.items() if name not in _CLUSTER_VARIABLES}
        token = {"RAY_AUTH_TOKEN_PATH": str(self.directory / "token"), processes.VARIABLE: str(self.directory)}
        return mine | ENVIRONMENT | token

    @property
    def dashboard(self) -> str:
        """What `serve deploy --address` takes."""
        return f"http://{self.head.address}:{DASHBOARD_PORT}"

    @property
    def token(self) -> str:
        """What clients of the cluster show."""
        return (self.directory / "token").read_text()

    def await_dashboard(self) -> None:
        """Returns when Serve's REST interface listens. Raises HostsFailed."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection((self.head.address, DASHBOARD_PORT), timeout=1):
                return
            time.sleep(POLL_SECONDS)
        raise HostsFailed(f"Serve's REST interface at {self.dashboard} does not listen")

    def __enter__(self) -> "HostCluster":
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Returns when all nodes have joined. Raises HostsFailed."""
        token = self.directory / "token"
        token.touch(mode=0o600)
        token.write_text(_new_token())
        self.start_node(self.head)
        self._await_ready(self.head)
        for host in self.hosts[1:]:
            self.start_node(host)
        for host in self.hosts[1:]:
            self._await_ready(host)

    def start_node(self, host: Host) -> None:
        """Starts, and does not wait for, the Ray node of `host`; again, after its `kill`."""
        if earlier := self._nodes.get(host.name):
            earlier.wait()
        number = self.hosts.index(host) + 1
        command = [sys.executable, "-m", "cluster.node", str(self.directory / f"h{number}"), host.address]
        command += ["--num-cpus", str(self._num_cpus)]
        if host is self.head:
            command += ["--dashboard-port", str(DASHBOARD_PORT)]
        else:
            command += ["--join", f"{self.head.address}:{GCS_PORT}"]
        folder = haproxy_folder(self.directory, number)
        folder.mkdir(exist_ok=True)
        with self._log(host).open("wb") as log:
            environment = self.environment | serve_settings.haproxy_files(folder)
            self._nodes[host.name] = host.start(command, environment, log)

    def stop(self) -> None:
        """Ends everything. Safe to call twice."""
        self._network.close()
        for node in self._nodes.values():
            node.wait()
        processes.end(self.directory)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _await_ready(self, host: Host) -> None:
        node, log = self._nodes[host.name], self._log(host)
        deadline = time.monotonic() + START_SECONDS
        while "\nready\n" not in "\n" + log.read_text(errors="replace"):
            if node.poll() is not None or time.monotonic() > deadline:
                state = f"not ready in {START_SECONDS:.0f} s" if node.poll() is None else f"exit {node.returncode}"
                raise HostsFailed(f"Ray on {host.address}: {state}\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(POLL_SECONDS)

    def _log(self, host: Host) -> Path:
        return self.directory / f"{host.name}.log"


def haproxy_folder(directory: Path, number: int) -> Path:
    """Where HAProxy's files of host `number` are. Real hosts would not share the disk."""
    return directory / f"p{number}"


def _new_token() -> str:
    """As `ray get-auth-token --generate` makes it, but not in the user's own ~/.ray."""
    from ray._private.authentication.authentication_token_generator import generate_new_authentication_token

    return str(generate_new_authentication_token())
