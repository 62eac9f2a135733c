"""Settings of Ray Serve that have no place in a YAML: environment of the processes that start a Ray node.

Serve reads them when it is imported.
"""

import sys
from pathlib import Path

SETTINGS = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",  # a frozen one would hold its CPUs through a drain
    # A front that dies before it answers: another gets the request (bodies up to 16 KB, HAProxy's buffer).
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    "RAY_SERVE_HAPROXY_NBTHREAD": "2",
}


def haproxy_files(folder: Path) -> dict[str, str]:
    """Keeps HAProxy's files in `folder`, which nobody else uses; /tmp/haproxy-serve is every user's, and every host's.

    A short path: HAProxy takes no socket's above 97 characters, and Serve adds a node's id of 56.
    """
    return {
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(Path(sys.executable).with_name("moray-haproxy")),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
    }
