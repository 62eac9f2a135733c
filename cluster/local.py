"""A Ray cluster of one node on this machine: every port on loopback, gone when its process ends.

What `ray.init()` starts by default listens on every interface. This starts a node's processes
(cluster/node.py) on 127.0.0.1, and its dashboard when the rest is up; `stop` ends what is left
by its mark.
"""

import os
import signal
import tempfile
from pathlib import Path

from cluster import node, processes

LOOPBACK = "127.0.0.1"
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's way of saying: this node's address is 127.0.0.1
    "RAY_worker_niceness": "0",  # Ray's 15, for good, would let anything else on the machine starve the engine
}


class LocalCluster:
    """Started by its constructor. The caller's environment, as it is then, is every process's.

    directory: for Ray's sockets and logs; it marks the cluster's processes. `prepare` was called with it.
    """

    def __init__(self, directory: Path, num_cpus: int | None = None) -> None:
        self._directory = directory
        self._node = node.start(directory, LOOPBACK, num_cpus=num_cpus)

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
        node.start_dashboard(self._node, self._directory, LOOPBACK, port)

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
