"""Keeps the gRPC servers of Ray's Python workers on loopback.

Serve opens one on every interface in each replica and has no setting for it. Ray runs
`keep_grpc_to_loopback` first thing in every worker of a local cluster (the job's
`worker_process_setup_hook`).
"""

from typing import Any

ALL_INTERFACES = "[::]:"
LOOPBACK = "127.0.0.1:"


def keep_grpc_to_loopback() -> None:
    """From now on an asyncio gRPC server asked to listen on every interface listens on 127.0.0.1."""
    from grpc import aio

    server: Any = aio._server.Server
    listen = server.add_insecure_port

    def listen_on_loopback(self: Any, address: str) -> int:
        return listen(self, address.replace(ALL_INTERFACES, LOOPBACK))

    server.add_insecure_port = listen_on_loopback
