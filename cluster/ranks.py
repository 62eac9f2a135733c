"""The ranks of a model as Ray actors: each in its bundle of the engine replica's placement group.

Ray places them and is told when one ends; the steps go over cluster/parallel.py.
"""

import contextlib
import logging
import threading
from typing import Any, Protocol

import ray
from ray.util import get_current_placement_group, get_node_ip_address
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.experts.client import ClientCounts, ExpertClient
from cluster.parallel import Layout, Rendezvous, World
from cluster.shard_group import OnLost, ShardGroup, follow
from cluster.starting import Starting, log_to

logger = logging.getLogger(__name__)

START_SECONDS = 120.0
"""For the processes of all ranks to start and to find each other."""


COUNTS_SECONDS = 1.0
"""For ranks to tell what they have counted; then what they told last is taken."""


class HasClient(Protocol):
    """The `experts` of a `Shard`'s options."""

    client: ExpertClient | None


class Rank:
    """A follower's actor. It runs in one thread, and counts are asked for in another."""

    _experts: HasClient | None = None

    def node(self) -> tuple[str, str]:
        """Ray's id of the node it is on, and its address."""
        return _node()

    def run(
        self, layout: Layout, rank: int, rendezvous: str, options: dict[str, Any], rank_timeout_s: float, leader: str
    ) -> None:
        """Returns when the group has stopped; raises what `Shard` raises. Ends the process when the group is lost.

        leader: names the first rank in the log.
        """
        log_to([logging.StreamHandler()])
        starting = Starting(f"{leader}/rank {rank}")
        self._experts = options.get("experts")
        follow(World(layout, rank, rendezvous, START_SECONDS, _node()[1]), options, rank_timeout_s, starting.ready)

    def expert_counts(self) -> ClientCounts | None:
        """Of this rank's client, if it has one."""
        client = None if self._experts is None else self._experts.client
        return None if client is None else client.snapshot()


class FollowerCounts:
    """What the followers' clients of expert servers have counted, by rank."""

    def __init__(self, followers: list[Any]) -> None:
        self._followers = followers
        self._last: dict[int, ClientCounts] = {}

    def __call__(self) -> dict[int, ClientCounts]:
        """From any thread; takes up to COUNTS_SECONDS."""
        asked = {follower.expert_counts.remote(): rank for rank, follower in enumerate(self._followers, start=1)}
        told, _ = ray.wait(list(asked), num_returns=len(asked), timeout=COUNTS_SECONDS) if asked else ([], [])
        for reference in told:
            with contextlib.suppress(ray.exceptions.RayError):
                if (counts := ray.get(reference)) is not None:
                    self._last[asked[reference]] = counts
        return self._last.copy()


def start_group(
    tensor: int, stages: int, options: dict[str, Any], rank_timeout_s: float, on_lost: OnLost, name: str = "engine"
) -> ShardGroup:
    """Starts the other ranks, and is rank 0, in the thread that will compute.

    options: of `Shard`. name: of this process, for the others' log. Raises ValueError when this actor's placement
    group has too few bundles, RankLost when a rank ends before all are ready, and what `Shard` raises.
    """
    size = tensor * stages
    logger.info("waiting for %d ranks to start", size - 1)
    followers = _start_followers(size)
    try:
        nodes = [_node(), *ray.get([follower.node.remote() for follower in followers], timeout=START_SECONDS)]
        layout = Layout(tensor, stages, tuple(node for node, _ in nodes), tuple(address for _, address in nodes))
        num_hosts, address = len(set(layout.hosts)), nodes[0][1]
        rendezvous = Rendezvous(None if num_hosts == 1 else address)
        runs = [
            follower.run.remote(layout, rank, rendezvous.address, options, rank_timeout_s, name)
            for rank, follower in enumerate(followers, start=1)
        ]
        world = World(layout, 0, rendezvous, START_SECONDS, address)
        group = ShardGroup(world, rank_timeout_s, on_lost, FollowerCounts(followers))
        threading.Thread(target=_watch, args=(runs, group), name="watch-actors", daemon=True).start()
        logger.info("%d stages of %d ranks on %d hosts", stages, tensor, num_hosts)
        group.load(options)
        return group
    except BaseException:
        for follower in followers:
            ray.kill(follower)
        raise


def _start_followers(size: int) -> list[Any]:
    group = get_current_placement_group()
    if group is None or len(group.bundle_specs) < size:
        held = 0 if group is None else len(group.bundle_specs)
        raise ValueError(
            f"{size} ranks need a placement group of {size} bundles, one a rank; this replica's has {held}. "
            "Leave placement_group_bundles out of the YAML, or give that many"
        )
    actor = ray.remote(Rank)
    return [
        actor.options(
            num_cpus=group.bundle_specs[rank].get("CPU", 0),
            max_concurrency=2,
            num_gpus=group.bundle_specs[rank].get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
        ).remote()
        for rank in range(1, size)
    ]


def _node() -> tuple[str, str]:
    return ray.get_runtime_context().get_node_id(), get_node_ip_address()


def _watch(runs: list[Any], group: ShardGroup) -> None:
    """Ray tells of a death on another host, and why a rank did not load."""
    (first, *_), _ = ray.wait(runs, num_returns=1)
    try:
        ray.get(first)
    except ray.exceptions.RayError as error:
        group.lose(f"rank {runs.index(first) + 1}: {error}")
