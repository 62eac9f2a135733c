"""One node of a Ray cluster: the processes that a node needs, and no more.

What `ray start` starts by default takes seconds that users wait for (autoscaler monitor, log monitor,
ten dashboard processes). Here the dashboard is only the part that `serve deploy` and `serve status`
talk to. Ray ties a node's processes to the one that started them, however that one ends.

    python -m cluster.node DIRECTORY ADDRESS [--join HEAD] [--num-cpus N] [--dashboard-port P]

runs a node in the foreground until SIGTERM, or the end of the process that started it.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from cluster import processes

GCS_PORT = 6379
"""Of heads on an address of their own."""
WATCH_SECONDS = 0.5
OBJECT_STORE_BYTES = 200 * 2**20
"""Tokens and activations do not pass through it."""


def start(
    directory: Path, address: str, *, head: str | None = None, num_cpus: int | None = None, gcs_port: int | None = None
) -> Any:
    """Ray's `Node` on `address`.

    directory: for its sockets and logs. head: "address:port" of the head to join; None starts a head.
    The caller's environment, as it is now, is every process's.
    """
    from ray._private.authentication.authentication_token_setup import (
        enable_token_auth_by_default,
        ensure_token_if_auth_enabled,
    )
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    class NodeWithoutDashboard(Node):
        def start_api_server(self, **_: object) -> None:
            """Later, by `start_dashboard`."""

    enable_token_auth_by_default()  # as ray.init and ray start do
    ensure_token_if_auth_enabled({}, create_token_if_missing=True)
    parameters = RayParams(
        node_ip_address=address,
        num_cpus=num_cpus,
        object_store_memory=OBJECT_STORE_BYTES,
        temp_dir=str(directory),
        dashboard_agent_listen_port=0,
        no_monitor=True,
    )
    if head is not None:
        parameters.gcs_address = head
    if gcs_port is not None:
        parameters.gcs_server_port = gcs_port
    parameters.include_log_monitor = False  # type: ignore[assignment]  # Ray annotates a flag as a string
    node = NodeWithoutDashboard(parameters, head=head is None, shutdown_at_exit=False, spawn_reaper=True)
    # A worker imports Ray twice before Ray itself would make it less urgent.
    processes.start_as_newcomers(node.all_processes["raylet"][0].process.pid)
    return node


def start_dashboard(node: Any, directory: Path, address: str, port: int) -> None:
    """Starts, and does not wait for, the REST interface of Serve at `address`."""
    import ray.dashboard.dashboard as dashboard

    logs = Path(node.get_logs_dir_path())
    options = {
        "host": address,
        "port": port,
        "port-retries": 0,
        "temp-dir": directory,
        "log-dir": logs,
        "session-dir": node.get_session_dir_path(),
        "gcs-address": node.gcs_address,
        "cluster-id-hex": node.cluster_id.hex(),
        "node-ip-address": address,
        "modules-to-load": "ServeHead",
    }
    command = [sys.executable, dashboard.__file__, *(f"--{name}={value}" for name, value in options.items())]
    with (logs / "dashboard.out").open("wb") as output:
        subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m cluster.node", description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("address")
    parser.add_argument("--join", metavar="HEAD", help="address:port of the cluster's head; without it this is one")
    parser.add_argument("--num-cpus", type=int)
    parser.add_argument("--dashboard-port", type=int, help="of the head")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _exit)
    os.environ[processes.VARIABLE] = str(arguments.directory)
    arguments.directory.mkdir(parents=True, exist_ok=True)
    port = None if arguments.join else GCS_PORT
    node = start(
        arguments.directory, arguments.address, head=arguments.join, num_cpus=arguments.num_cpus, gcs_port=port
    )
    if arguments.dashboard_port:
        start_dashboard(node, arguments.directory, arguments.address, arguments.dashboard_port)
    print("ready", flush=True)
    try:
        parent = os.getppid()
        while not node.dead_processes() and os.getppid() == parent:
            time.sleep(WATCH_SECONDS)
    finally:
        node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
        processes.end(arguments.directory)  # the dashboard, and agents that take long to miss their raylet


def _exit(_signal: int, _frame: FrameType | None) -> None:
    sys.exit(0)


if __name__ == "__main__":
    main()
