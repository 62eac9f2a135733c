"""From a Serve YAML to the plan of each of its models."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from ray.serve.schema import DeploymentSchema, ServeApplicationSchema, ServeDeploySchema

from deployments.config import ConfigError, ModelConfig, parse
from deployments.demand import OURS
from deployments.plan.architecture import architecture
from deployments.plan.fit import Fault, Memory, check
from deployments.plan.memory import Resources
from deployments.plan.needs import Layout, Model, ModelNeeds, kv_blocks


@dataclass(frozen=True)
class Given:
    """What the command line adds to the YAML. Memory in bytes; architectures by model id."""

    gpu_memory: int | None = None
    host_memory: int | None = None
    headroom: float = 0.1
    architectures: Mapping[str, Path] | None = None


@dataclass(frozen=True)
class ModelPlan:
    """engines: replicas of the engine. source: of the architecture.

    kv_tokens, kv_sequences: what the KV cache of one replica holds, None if nothing tells: so many tokens in any
    case, and so many sequences of max_model_len at once, whose chunked layers need less.
    gpus: of all engines and expert servers of the model together.
    """

    id: str
    source: str
    dtype: str
    layout: Layout
    engines: int
    memory: Memory
    needs: ModelNeeds | None
    kv_tokens: int | None
    kv_sequences: float | None
    gpus: float
    faults: tuple[Fault, ...]


def plan(path: Path, given: Given) -> list[ModelPlan]:
    """One plan for each model of the YAML at `path`. Raises ConfigError."""
    try:
        config = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise ConfigError(f"{path}: {error}") from None
    ours = [application for application in config.applications if application.import_path == OURS]
    if not ours:
        raise ConfigError(f"{path} has no application with import_path {OURS}")
    return [
        _plan_model(model, _deployments(application), given)
        for application in ours
        for model in parse(application.args).models
    ]


def _deployments(application: ServeApplicationSchema) -> dict[str, dict[str, Any]]:
    """What the YAML says of each deployment, by name."""
    return {deployment.name: _said(deployment) for deployment in application.deployments}


def _said(deployment: DeploymentSchema) -> dict[str, Any]:
    return deployment.model_dump(exclude_unset=True)


def _plan_model(model: ModelConfig, deployments: dict[str, dict[str, Any]], given: Given) -> ModelPlan:
    engine = deployments.get(f"engine-{model.id}", {})
    experts = deployments.get(f"experts-{model.id}", {})
    if experts and model.experts is None:
        raise ConfigError(
            f"model {model.id!r}: the YAML has a deployment experts-{model.id}, but the model has no `experts`; "
            "add `experts: {copies: 2}` to it, or drop the deployment"
        )
    args, source = architecture(model, (given.architectures or {}).get(model.id))
    if model.experts is not None and args.moe_args is None:
        raise ConfigError(f"model {model.id!r}: it has no experts to put on servers; drop `experts`")
    layout = Layout(
        model.engine.tensor_parallel_size,
        model.engine.pipeline_parallel_size,
        _replicas(experts, model.experts.copies) if model.experts is not None else None,
        model.experts.copies if model.experts is not None else 1,
        model.experts.memory if model.experts is not None else None,
    )
    ranks = layout.tensor_parallel_size * layout.pipeline_parallel_size
    of_rank = Resources.of_bundle(model.engine.bundle_per_rank) if ranks > 1 else _resources(engine)
    of_server = _resources(experts)
    memory = Memory(_fill(of_rank, given), _fill(of_server, given), given.headroom)
    sized = Model(args, model.engine)
    needs, faults = check(sized, layout, memory)
    blocks = kv_blocks(needs, model.engine, memory.room(memory.rank)) if needs else None
    return ModelPlan(
        id=model.id,
        source=source,
        dtype=model.engine.dtype,
        layout=layout,
        engines=_replicas(engine),
        memory=memory,
        needs=needs,
        kv_tokens=None if needs is None or blocks is None else needs.blocks.fitting(blocks),
        kv_sequences=None if needs is None or blocks is None else blocks / needs.blocks_per_sequence,
        gpus=of_rank.gpus * ranks * _replicas(engine) + of_server.gpus * (layout.servers or 0),
        faults=tuple(faults),
    )


def _resources(deployment: dict[str, Any]) -> Resources:
    return Resources.of_actor(deployment.get("ray_actor_options") or {})


def _fill(resources: Resources, given: Given) -> int | None:
    return resources.fill(given.gpu_memory, given.host_memory)


def _replicas(deployment: dict[str, Any], default: int = 1) -> int:
    """Those that are always there. default: where the YAML does not say."""
    replicas = deployment.get("num_replicas")
    if isinstance(replicas, int):
        return replicas
    autoscaling = deployment.get("autoscaling_config")
    return default if autoscaling is None else int(autoscaling.get("min_replicas") or 1)
