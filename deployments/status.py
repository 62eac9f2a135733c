"""What replicas tell about themselves: the parts of `GET /cluster`.

Each deployment's replicas answer `status()` with their part, so that whoever adds a kind of process adds its
fields here and fills them in where that process lives.
"""

import os
import secrets
import socket
from typing import Any

import ray
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve.exceptions import RayServeException


class ProcessStatus(BaseModel):
    """A process of the application. `host`: its node's address."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pid: int
    host: str


class ReplicaStatus(ProcessStatus):
    """A replica of a Serve deployment; `replica_id` is Serve's name for it."""

    replica_id: str


class FrontStatus(ReplicaStatus):
    """A replica of the front."""


class RankStatus(ProcessStatus):
    """One rank of an engine's shard group."""

    rank: int


class EngineStatus(ReplicaStatus):
    """An engine replica.

    running, waiting: sequences in steps, and in the queue. kv_cache_usage: share of the KV blocks in use.
    ranks: of its shard group; the first may be the replica's own process.
    """

    model: str
    running: int
    waiting: int
    kv_cache_usage: float
    ranks: list[RankStatus] = []


class ExpertServerStatus(ReplicaStatus):
    """A replica of an expert deployment. epoch: of the routing table that it knows. experts: [layer, expert] pairs."""

    model: str
    epoch: int
    experts: list[tuple[int, int]]


class ClusterStatus(BaseModel):
    """All processes that answered. `silent`: deployments' replicas that Serve counts as running and that did not."""

    fronts: list[FrontStatus] = []
    engines: list[EngineStatus] = []
    experts: list[ExpertServerStatus] = []
    silent: dict[str, int] = {}


def this_replica() -> dict[str, Any]:
    """The fields of `ReplicaStatus` for the calling process; outside Serve it gets a random id."""
    try:
        replica_id = serve.get_replica_context().replica_id.unique_id
        host = ray.util.get_node_ip_address()
    except RayServeException:
        replica_id, host = secrets.token_hex(4), socket.gethostname()
    return {"replica_id": replica_id, "pid": os.getpid(), "host": host}
