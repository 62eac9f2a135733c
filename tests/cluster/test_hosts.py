"""What can be said of a cluster of hosts without starting one; tests/e2e/test_hosts.py starts one."""

from pathlib import Path

from cluster.hosts import haproxy_folder
from cluster.local import new_directory
from cluster.serve_settings import haproxy_files

LONGEST_SOCKET_PATH = 97
"""Of HAProxy, which refuses to start with a longer one."""
NODE_ID = "f" * 56


def test_sockets_of_haproxy_have_short_paths() -> None:
    directory = new_directory()
    directory.rmdir()
    environment = haproxy_files(haproxy_folder(directory, 250))
    sockets = [Path(path) for name, path in environment.items() if name.endswith("SOCKET_PATH")]
    assert len(sockets) == 2
    assert all(len(str(socket.parent / NODE_ID / socket.name)) <= LONGEST_SOCKET_PATH for socket in sockets)
