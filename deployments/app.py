"""From a Serve YAML's `args` to the application: the front, and each model's engine and expert servers."""

from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application

from cluster.placement import misfit
from deployments import room
from deployments.config import ConfigError, ModelConfig, read
from deployments.front.deployment import Front

ENGINE: Any = "deployments.engine.deployment.Engine"
"""By name, so that building the application does not wait for torch; the replica imports it."""
EXPERTS: Any = "deployments.experts.deployment.ExpertReplica"
DIRECTORY: Any = "deployments.experts.directory.ExpertDirectory"

UNLIMITED = 1_000_000
"""Serve queues nothing out of sight: the engine admits or answers 429."""

HEALTH: dict[str, Any] = {"health_check_period_s": 1.0, "health_check_timeout_s": 5.0}
"""A dead replica is replaced after a second, a frozen one after three checks missed."""

ROUTER = {"request_router_class": "deployments.front.engine_router.EngineRouter"}
DRAIN_SECONDS = 300.0
"""A replica that is taken away may finish its streams for this long."""
ON_HEAD = {"node:__internal_head__": 0.001}
"""Beside Serve's controller: a directory on a host that loses its link would take all others for dead."""


def build(args: dict[str, Any]) -> Application:
    """The application that `args` describe (see `AppConfig`). Raises ConfigError.

    Everything here is a default: the YAML's `deployments` may say otherwise.
    """
    config = read(args)
    front: Any = Front
    options = {"graceful_shutdown_timeout_s": DRAIN_SECONDS, "ray_actor_options": {"num_cpus": 0.5}}
    directories = {model.id: _directory(model) for model in config.models if model.experts}
    engines = {model.id: _engine(model, directories.get(model.id)) for model in config.models}
    experts = [_experts(model, directories[model.id]) for model in config.models if model.experts]
    return front.options(**options, **HEALTH).bind(config, engines, experts, list(directories.values()))


def _directory(model: ModelConfig) -> Application:
    deployment: Any = serve.deployment(
        name=f"directory-{model.id}",
        num_replicas=1,
        max_ongoing_requests=UNLIMITED,
        ray_actor_options={"num_cpus": 0, "resources": ON_HEAD},
        health_check_period_s=1.0,
        graceful_shutdown_timeout_s=1.0,
    )
    return deployment(DIRECTORY).bind(model)


def _experts(model: ModelConfig, directory: Application) -> Application:
    assert model.experts is not None
    deployment: Any = serve.deployment(
        name=f"experts-{model.id}",
        num_replicas=model.experts.copies,
        max_ongoing_requests=UNLIMITED,
        graceful_shutdown_timeout_s=60.0,
        ray_actor_options={"num_cpus": 1},
        **HEALTH,
    )
    return deployment(EXPERTS).bind(model, directory)


def _engine(model: ModelConfig, directory: Application | None) -> Application:
    options = placement(model, room.in_all())
    deployment: Any = serve.deployment(
        name=f"engine-{model.id}",
        max_ongoing_requests=UNLIMITED,
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
        request_router_config=ROUTER,
        **options,
        **HEALTH,
    )
    return deployment(ENGINE).bind(model, directory)


def placement(model: ModelConfig, nodes: Mapping[str, Mapping[str, float]] | None) -> dict[str, Any]:
    """Of a replica. Rank 0 is the replica itself, in the first bundle; the others have one each, near if possible.

    nodes: what each has in all; None when no cluster is known. Raises ConfigError when ranks fit on none.
    """
    bundles = model.engine.bundles
    if not bundles:
        return {"ray_actor_options": {"num_cpus": 1}}
    fault = None if nodes is None or model.engine.wait_for_nodes else misfit(bundles, nodes)
    if fault:
        raise ConfigError(
            f"model {model.id!r} has {len(bundles)} ranks: {fault}. Lower tensor_parallel_size or bundle_per_rank, "
            "add nodes, or set wait_for_nodes if an autoscaler will"
        )
    return {
        "ray_actor_options": {"num_cpus": bundles[0].get("CPU", 0), "num_gpus": bundles[0].get("GPU", 0)},
        "placement_group_bundles": bundles,
        "placement_group_strategy": "PACK",
    }
