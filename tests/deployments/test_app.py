from pathlib import Path
from typing import Any

import pytest

from deployments.app import ON_HEAD, build, placement
from deployments.config import ConfigError, ModelConfig


def model(**engine: Any) -> ModelConfig:
    return ModelConfig(id="m", path="x", engine=engine)


def test_one_rank_needs_no_placement_group() -> None:
    assert placement(model(), {}) == {"ray_actor_options": {"num_cpus": 1}}


def test_every_rank_has_a_bundle_and_the_replica_is_in_the_first() -> None:
    options = placement(model(tensor_parallel_size=2, pipeline_parallel_size=2, bundle_per_rank={"CPU": 2}), None)
    assert options["placement_group_bundles"] == [{"CPU": 2}] * 4
    assert options["placement_group_strategy"] == "PACK"
    assert options["ray_actor_options"] == {"num_cpus": 2, "num_gpus": 0}


def test_ranks_that_fit_no_node_are_refused_with_what_there_is() -> None:
    nodes = {"node 10.0.0.1": {"CPU": 2.0}, "node 10.0.0.2": {"CPU": 0.5}}
    message = (
        r"model 'm' has 3 ranks: bundle 2 of 3 \(CPU 1\) fits on no node.*10\.0\.0\.1 CPU 0; node 10\.0\.0\.2 CPU 0\.5"
    )
    with pytest.raises(ConfigError, match=message):
        placement(model(tensor_parallel_size=3), nodes)
    assert placement(model(tensor_parallel_size=3, wait_for_nodes=True), nodes)["placement_group_bundles"]


def test_there_is_an_expert_server_for_each_copy(tmp_path: Path) -> None:
    application: Any = build({"models": [{"id": "m", "path": str(tmp_path), "experts": {"copies": 3}}]})
    _, _, experts, directories = application._bound_deployment.init_args
    assert experts[0]._bound_deployment.num_replicas == 3
    assert directories[0]._bound_deployment.ray_actor_options["resources"] == ON_HEAD
