"""Whether a Serve YAML fits the machine, told before anything starts: Ray itself would wait for ever."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ray.serve.schema import DeploymentSchema, ServeDeploySchema

from deployments.config import EngineConfig, ExpertsConfig

OURS = "deployments.app:build"
DEFAULT_CPUS = {"front": 0.5, "directory": 0}
"""What deployments.app gives a deployment that the YAML does not mention, by its name up to "-"; any other gets 1."""


class DoesNotFit(Exception):
    """The message says who asks for what, and what there is."""


def check(config: ServeDeploySchema, available: Mapping[str, float]) -> None:
    """Raises DoesNotFit if the deployments ask for more than `available` (Ray resource names)."""
    asked = {name: demand for name, demand in demands(config).items() if demand}
    for resource in sorted({resource for demand in asked.values() for resource in demand}):
        total, there = sum(demand[resource] for demand in asked.values()), available.get(resource, 0)
        if total > there:
            shares = ", ".join(f"{name} {demand[resource]:g}" for name, demand in asked.items() if demand[resource])
            raise DoesNotFit(
                f"the deployments need {total:g} {resource} ({shares}); this machine has {there:g}. "
                "Lower num_replicas, ray_actor_options or bundle_per_rank in the YAML"
            )


def demands(config: ServeDeploySchema) -> dict[str, Counter[str]]:
    """What all replicas of each deployment ask for together, by deployment name."""
    return {
        deployment.name: _demand(
            deployment, _bundles(application, deployment), _default_replicas(application, deployment)
        )
        for application in config.applications
        for deployment in [*application.deployments, *_unmentioned(application)]
    }


def _unmentioned(application: Any) -> list[DeploymentSchema]:
    if application.import_path != OURS:
        return []
    names = ["front"]
    for model in application.args.get("models", ()):
        kinds = ["engine", "experts", "directory"] if model.get("experts") is not None else ["engine"]
        names += [f"{kind}-{model.get('id')}" for kind in kinds]
    mentioned = {deployment.name for deployment in application.deployments}
    return [DeploymentSchema(name=name) for name in names if name not in mentioned]


def _bundles(application: Any, deployment: DeploymentSchema) -> list[dict[str, float]]:
    """Of one replica's ranks; none for a replica that is one process."""
    said = deployment.model_dump(exclude_unset=True).get("placement_group_bundles")
    if said or application.import_path != OURS:
        return said or []
    engines = {f"engine-{model.get('id')}": model.get("engine", {}) for model in application.args.get("models", ())}
    return EngineConfig.model_validate(engines.get(deployment.name, {})).bundles


def _default_replicas(application: Any, deployment: DeploymentSchema) -> int:
    """Where the YAML does not say: one, but a server for each copy of the experts."""
    if application.import_path != OURS:
        return 1
    experts = {f"experts-{model.get('id')}": model.get("experts") for model in application.args.get("models", ())}
    said = experts.get(deployment.name)
    return 1 if said is None else ExpertsConfig.model_validate(said).copies


def _demand(deployment: DeploymentSchema, bundles: list[dict[str, float]], default_replicas: int) -> Counter[str]:
    said = deployment.model_dump(exclude_unset=True)
    options = said.get("ray_actor_options") or {}
    replicas = said.get("num_replicas")
    if not isinstance(replicas, int):
        autoscaling = said.get("autoscaling_config")
        replicas = default_replicas if autoscaling is None else _first_replicas(autoscaling)
    one = {
        "CPU": options.get("num_cpus", DEFAULT_CPUS.get(deployment.name.partition("-")[0], 1)),
        "GPU": options.get("num_gpus", 0),
        "memory": options.get("memory", 0),
        **options.get("resources", {}),
    }
    if bundles:
        one = {
            resource: sum(bundle.get(resource, 0) for bundle in bundles) for bundle in bundles for resource in bundle
        }
    return Counter({resource: amount * replicas for resource, amount in one.items() if amount})


def _first_replicas(autoscaling: Mapping[str, Any]) -> int:
    """Those that an autoscaled deployment starts with; without room for more it goes on with them."""
    return int(autoscaling.get("initial_replicas") or autoscaling.get("min_replicas", 1))
