import pytest
from ray.serve.schema import ServeDeploySchema

from deployments.demand import DoesNotFit, check, demands


def config(*deployments: dict[str, object], **engine: object) -> ServeDeploySchema:
    application = {
        "name": "moray",
        "import_path": "deployments.app:build",
        "args": {"models": [{"id": "m", "path": "x", "engine": engine}]},
        "deployments": list(deployments),
    }
    return ServeDeploySchema.model_validate({"applications": [application]})


def test_replicas_and_what_the_yaml_leaves_out_count() -> None:
    two_engines = config({"name": "engine-m", "num_replicas": 2, "ray_actor_options": {"num_cpus": 1.5}})
    assert demands(two_engines) == {"engine-m": {"CPU": 3.0}, "front": {"CPU": 0.5}}
    autoscaled = config({"name": "engine-m", "autoscaling_config": {"min_replicas": 3, "max_replicas": 5}})
    assert demands(autoscaled)["engine-m"] == {"CPU": 3}


def test_what_fits_exactly_passes() -> None:
    check(config(), {"CPU": 1.5})


def test_the_message_names_who_asks_for_what() -> None:
    with pytest.raises(DoesNotFit, match=r"need 1\.5 CPU \(.*front 0\.5.*\)") as error:
        check(config(), {"CPU": 1})
    assert "this machine has 1." in str(error.value)


def test_other_resources_count_too() -> None:
    with pytest.raises(DoesNotFit, match="need 1 GPU"):
        check(config({"name": "engine-m", "ray_actor_options": {"num_cpus": 1, "num_gpus": 1}}), {"CPU": 8})


def test_every_rank_of_every_replica_counts() -> None:
    ranks = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "bundle_per_rank": {"CPU": 0.5, "GPU": 1}}
    assert demands(config(**ranks))["engine-m"] == {"CPU": 2, "GPU": 4}
    two = config({"name": "engine-m", "num_replicas": 2, "ray_actor_options": {"num_cpus": 0.5}}, **ranks)
    assert demands(two)["engine-m"] == {"CPU": 4, "GPU": 8}
    bundles = config({"name": "engine-m", "placement_group_bundles": [{"CPU": 1}, {"CPU": 3}]}, **ranks)
    assert demands(bundles)["engine-m"] == {"CPU": 4}
    with pytest.raises(DoesNotFit, match="need 4 GPU"):
        check(config(**ranks), {"CPU": 8})


def test_expert_servers_count_and_their_directory_needs_nothing() -> None:
    application = {
        "import_path": "deployments.app:build",
        "args": {"models": [{"id": "m", "path": "x", "experts": {}}]},
        "deployments": [{"name": "experts-m", "num_replicas": 4, "ray_actor_options": {"num_cpus": 0.1}}],
    }
    asked = demands(ServeDeploySchema.model_validate({"applications": [application]}))
    assert asked["experts-m"] == {"CPU": pytest.approx(0.4)}
    assert asked["engine-m"] == {"CPU": 1}
    assert not asked["directory-m"]


def test_there_is_an_expert_server_for_each_copy_unless_the_yaml_says_otherwise() -> None:
    def asked(experts: dict[str, int], *deployments: dict[str, object]) -> object:
        models = [{"id": "m", "path": "x", "experts": experts}]
        application = {"import_path": "deployments.app:build", "args": {"models": models}, "deployments": deployments}
        return demands(ServeDeploySchema.model_validate({"applications": [application]}))["experts-m"]

    assert asked({}) == {"CPU": 2}
    assert asked({"copies": 3}) == {"CPU": 3}
    assert asked({"copies": 3}, {"name": "experts-m", "ray_actor_options": {"num_cpus": 2}}) == {"CPU": 6}
    assert asked({"copies": 3}, {"name": "experts-m", "autoscaling_config": {"min_replicas": 4}}) == {"CPU": 4}
    autoscaled = {"min_replicas": 2, "initial_replicas": 3, "max_replicas": 5}
    assert asked({}, {"name": "experts-m", "num_replicas": "auto", "autoscaling_config": autoscaled}) == {"CPU": 3}
