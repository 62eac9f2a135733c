"""An expert server as a Serve deployment: one replica is one server; `num_replicas` is their number."""

import logging

import ray
import torch
from prometheus_client import CollectorRegistry
from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from cluster import processes
from cluster.experts.membership import Membership
from cluster.experts.server import ExpertServer
from cluster.experts.weights import HeldExperts
from deployments.config import ModelConfig
from deployments.experts.autoscaling import BUSY_SHARE, POLICY, BusyShare, target_of
from deployments.experts.directory import DirectoryHandle
from deployments.experts.metrics import ServerCollector
from deployments.metrics import Snapshot, snapshot
from deployments.status import ExpertServerStatus, starting_replica, this_replica
from model.checkpoint import open_checkpoint

logger = logging.getLogger(__name__)

LEAVE_SECONDS = 20.0
"""For the directory to place a leaving server's experts elsewhere."""


class ExpertReplica:
    """Holds the experts that the directory assigns, and computes them for engines.

    Raises CheckpointError or ValueError at construction when the model cannot be opened or has no experts, or when
    its number is to follow requests, which never come.
    """

    def __init__(self, config: ModelConfig, directory: DeploymentHandle) -> None:
        assert config.experts is not None
        starting = starting_replica()
        self._model, self._has_left = config.id, False
        _check_policy()
        checkpoint = open_checkpoint(config.path)
        if checkpoint.args.moe_args is None:
            raise ValueError(f"model {config.id!r} has no experts: remove `experts` from its configuration")
        torch.set_num_threads(1)
        self._experts = experts = HeldExperts(checkpoint, getattr(torch, config.engine.dtype))
        self._replica = this_replica()
        name, threads = self._replica["replica_id"], config.experts.num_threads
        self._server = ExpertServer(experts, ray.util.get_node_ip_address(), name, threads)
        self._membership = Membership(self._server, experts, DirectoryHandle(directory), config.experts.memory)
        self._busy_share = BusyShare(lambda: self._server.busy_seconds)
        self._registry = CollectorRegistry()
        self._registry.register(ServerCollector(self._server, experts, config.id))
        processes.serve_first()
        self._server.start()
        self._membership.start()
        starting.ready()

    def status(self) -> ExpertServerStatus:
        units = sorted(self._experts.units)
        return ExpertServerStatus(**self._replica, model=self._model, epoch=self._membership.epoch, experts=units)

    def metrics(self) -> Snapshot:
        return snapshot(self._registry)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve calls it every few seconds where the YAML gives `autoscaling_config`."""
        return {BUSY_SHARE: self._busy_share()}

    def check_health(self) -> None:
        """Serve calls it; raises when the replica should be replaced."""
        if not self._server.is_alive:
            raise RuntimeError(f"the serving thread of expert server {self._server.address.id} has ended")
        if self._membership.error is not None:
            raise RuntimeError(f"expert server {self._server.address.id} {self._membership.error}")

    def __del__(self) -> None:
        """Serve calls it when the replica is taken away: engines go on without noticing."""
        if getattr(self, "_membership", None) is None or self._has_left:
            return
        self._has_left = True
        if not self._membership.leave(LEAVE_SECONDS):
            logger.warning("expert server %s ends while experts are still asked of it", self._server.address.id)
        self._server.stop()


def _check_policy() -> None:
    """Raises ValueError when the YAML gives an `autoscaling_config` that would have no effect, or is faulty."""
    try:
        context = serve.get_replica_context()
    except RayServeException:  # outside Serve
        return
    autoscaling = context._deployment_config.autoscaling_config
    if autoscaling is None:
        return
    if autoscaling.policy.is_default_policy_function():  # which is so unless the YAML says it: it replaces all defaults
        raise ValueError(
            f"autoscaling_config of {context.deployment} has no policy, and Serve's own counts requests, which expert "
            f"servers do not get: add `policy: {{policy_function: {POLICY}}}`"
        )
    if autoscaling.policy.policy_function == POLICY:
        target_of(autoscaling.policy.policy_kwargs)
