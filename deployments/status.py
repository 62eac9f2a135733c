"""What replicas tell about themselves: the parts of `GET /cluster`.

Each deployment's replicas answer `status()` with their part, so that whoever adds a kind of process adds its
fields here and fills them in where that process lives.
"""

import logging
import os
import secrets
import socket
from typing import Any

import ray
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve.exceptions import RayServeException

from cluster.starting import Phase, Starting, log_to


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
    ranks: of its shard group; the first may be the replica's own process. expert_epoch: of the routing table that the
    first uses; None without expert servers.
    """

    model: str
    running: int
    waiting: int
    kv_cache_usage: float
    ranks: list[RankStatus] = []
    expert_epoch: int | None = None


class ExpertServerStatus(ReplicaStatus):
    """A replica of an expert deployment. epoch: of the routing table that it knows. experts: [layer, expert] pairs."""

    model: str
    epoch: int
    experts: list[tuple[int, int]]


class DirectoryStatus(ReplicaStatus):
    """The directory of a model's experts.

    epoch: of its table, None before the first. servers: by id, how many experts each holds and how many it should.
    fewest_copies: of any expert. copies: [layer, expert, servers that the table names]. imbalance: by layer, rows of
    the busiest server over the mean, of late.
    """

    model: str
    epoch: int | None
    servers: list["MemberStatus"]
    fewest_copies: int
    copies: list[tuple[int, int, int]]
    imbalance: dict[int, float]


class MemberStatus(BaseModel):
    """An expert server as the directory knows it."""

    id: str
    host: str
    holds: int
    assigned: int
    is_leaving: bool


class StartingStatus(ProcessStatus):
    """A process that is not ready. process: its deployment, Serve's id, and its rank if it is not the first.

    phase: what it does or waits for. seconds: since it was started.
    """

    process: str
    phase: str
    seconds: float

    @classmethod
    def of(cls, phase: Phase) -> "StartingStatus":
        seconds = round(phase.seconds, 1)
        return cls(pid=phase.pid, host=phase.host, process=phase.process, phase=phase.phase, seconds=seconds)


class ClusterStatus(BaseModel):
    """All processes that answered, and those that are `starting`. `silent`: deployments' replicas that Serve counts as
    running and that did not answer."""

    fronts: list[FrontStatus] = []
    engines: list[EngineStatus] = []
    experts: list[ExpertServerStatus] = []
    directories: list[DirectoryStatus] = []
    starting: list[StartingStatus] = []
    silent: dict[str, int] = {}


def this_replica() -> dict[str, Any]:
    """The fields of `ReplicaStatus` for the calling process; outside Serve it gets a random id."""
    try:
        replica_id = serve.get_replica_context().replica_id.unique_id
        host = ray.util.get_node_ip_address()
    except RayServeException:
        replica_id, host = secrets.token_hex(4), socket.gethostname()
    return {"replica_id": replica_id, "pid": os.getpid(), "host": host}


def starting_replica() -> Starting:
    """First of all in a replica's constructor; `ready` is to be called on it when the replica is.

    What our loggers tell then goes where Serve's log of the replica goes, but at once: Serve may buffer its own.
    """
    try:
        context = serve.get_replica_context()
    except RayServeException:
        return Starting(f"process {os.getpid()}")
    log_to([getattr(handler, "target", handler) for handler in logging.getLogger("ray.serve").handlers])
    return Starting(f"{context.deployment}/{context.replica_id.unique_id}")
