"""A Ray cluster of one node on this machine: every port on loopback, gone when its process ends.

What `ray.init()` starts by default takes seconds that a newcomer waits for (autoscaler
monitor, log monitor, ten dashboard processes) and listens on every interface. This starts
the node's processes alone, on 127.0.0.1, and of the dashboard only the part that
`serve deploy` and `serve status` talk to, when the rest is up. Ray ties these processes
to the one that started them, however that one ends; `stop` ends what is left by its mark.
"""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cluster import processes

LOOPBACK = "127.0.0.1"
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's way of saying: this node's address is 127.0.0.1
    "RAY_worker_niceness": "0",  # Ray's 15 would let anything else on the machine starve the engine
}
OBJECT_STORE_BYTES = 200 * 2**20
"""Tokens and activations do not pass through it."""


class LocalCluster:
    """Started by its constructor. The caller's environment, as it is then, is every process's.

    directory: for Ray's sockets and logs; it marks the cluster's processes. `prepare` was called with it.
    """

    def __init__(self, directory: Path, num_cpus: int | None = None) -> None:
        self._directory = directory
        self._node = _start_head(directory, num_cpus)

    def connect(self) -> None:
        """Makes this process the cluster's driver. Its handling of SIGTERM stays as it was; Ray brings its own."""
        import ray

        handler = signal.getsignal(signal.SIGTERM)
        ray.init(
            address=self._node.gcs_address,
            log_to_driver=False,
            configure_logging=False,
            runtime_env={"worker_process_setup_hook": "cluster.loopback.keep_grpc_to_loopback"},
        )
        signal.signal(signal.SIGTERM, handler)

    def start_dashboard(self, port: int) -> None:
        """Starts, and does not wait for, the REST interface of Serve on loopback."""
        import ray.dashboard.dashboard as dashboard

        logs = Path(self._node.get_logs_dir_path())
        options = {
            "host": LOOPBACK,
            "port": port,
            "port-retries": 0,
            "temp-dir": self._directory,
            "log-dir": logs,
            "session-dir": self._node.get_session_dir_path(),
            "gcs-address": self._node.gcs_address,
            "cluster-id-hex": self._node.cluster_id.hex(),
            "node-ip-address": LOOPBACK,
            "modules-to-load": "ServeHead",
        }
        command = [sys.executable, dashboard.__file__, *(f"--{name}={value}" for name, value in options.items())]
        with (logs / "dashboard.out").open("wb") as output:
            subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL)

    def is_alive(self) -> bool:
        return not self._node.dead_processes()

    def stop(self) -> None:
        """Ends every process of this cluster. Safe to call twice."""
        import ray

        ray.shutdown()
        self._node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
        processes.end(self._directory)


def prepare(directory: Path) -> None:
    """Sets the environment of a local cluster. Ray reads it when it is imported: call this before."""
    os.environ[processes.VARIABLE] = str(directory)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def new_directory() -> Path:
    """For a cluster's sockets and logs. In /tmp, since the path of a Unix socket must be short."""
    return Path(tempfile.mkdtemp(prefix="moray-", dir="/tmp"))


def _start_head(directory: Path, num_cpus: int | None) -> Any:
    from ray._private.authentication.authentication_token_setup import (
        enable_token_auth_by_default,
        ensure_token_if_auth_enabled,
    )
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    class Head(Node):
        def start_api_server(self, **_: object) -> None:
            """Later, by `start_dashboard`."""

    enable_token_auth_by_default()  # as ray.init and ray start do
    ensure_token_if_auth_enabled({}, create_token_if_missing=True)
    parameters = RayParams(
        node_ip_address=LOOPBACK,
        num_cpus=num_cpus,
        object_store_memory=OBJECT_STORE_BYTES,
        temp_dir=str(directory),
        dashboard_agent_listen_port=0,
        no_monitor=True,
    )
    parameters.include_log_monitor = False  # type: ignore[assignment]  # Ray annotates a flag as a string
    return Head(parameters, head=True, shutdown_at_exit=False, spawn_reaper=True)
