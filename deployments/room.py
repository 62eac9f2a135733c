"""What the nodes of the running cluster have, and who waits for it in vain: Ray says nothing, and waits for ever."""

from collections.abc import Iterable
from typing import Any

import ray
from ray._private.state import available_resources_per_node

from cluster.placement import misfit
from deployments.config import ModelConfig

Nodes = dict[str, dict[str, float]]
"""Resources by the name of a living node."""


def in_all() -> Nodes | None:
    """None when no cluster is known."""
    return {_name(node): node["Resources"] for node in _living()} if ray.is_initialized() else None


def free() -> Nodes:
    """What nobody has reserved."""
    left = available_resources_per_node()
    return {_name(node): left.get(node["NodeID"], {}) for node in _living()}


def waiting_in_vain(models: Iterable[ModelConfig], has_room: Iterable[str]) -> list[str]:
    """One line for each engine whose ranks find no room now. has_room: engines' deployments that have found it."""
    placed, nodes = set(has_room), free()
    waiting = [(f"engine-{model.id}", model.engine.bundles) for model in models]
    faults = [(name, misfit(bundles, nodes)) for name, bundles in waiting if bundles and name not in placed]
    return [f"{name} waits for room: {fault}" for name, fault in faults if fault]


def _living() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _name(node: dict[str, Any]) -> str:
    return f"node {node['NodeManagerAddress']} ({node['NodeID'][:8]})"
