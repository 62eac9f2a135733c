"""The manifests for real clusters, against the schemas of the tools that read them."""

import json
import os
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start
from ray.serve.schema import ServeDeploySchema

from deployments.plan.plan import Given, plan

ROOT = Path(__file__).parents[2]
RAYSERVICE = ROOT / "configs/kubernetes/rayservice.yaml"
LAUNCHER = ROOT / "examples/ray-cluster/cluster.yaml"
CRD = Path(os.environ.get("RAYSERVICE_CRD", ROOT / ".run/ray.io_rayservices.yaml"))
"""The operator's; `make check-kubernetes` downloads it."""


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


@pytest.fixture(scope="module")
def crd() -> Any:
    if not CRD.exists():
        pytest.skip("KubeRay's CRD is not here: `make check-kubernetes` downloads it, or RAYSERVICE_CRD names it")
    return yaml.load(CRD.read_text(), Loader=yaml.CSafeLoader)


def strict(schema: Any) -> Any:
    """The schema with unknown keys forbidden, as `kubectl apply --validate=strict` sees it."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    known = {key: strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        known.setdefault("additionalProperties", False)
    return known


def faults(crd: Any, manifest: Any) -> Iterator[str]:
    version = manifest["apiVersion"].removeprefix(f"{crd['spec']['group']}/")
    [schema] = [v["schema"]["openAPIV3Schema"] for v in crd["spec"]["versions"] if v["name"] == version and v["served"]]
    schema["properties"]["metadata"] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    for error in jsonschema.Draft202012Validator(strict(schema)).iter_errors(manifest):
        yield f"{error.json_path}: {error.message[:300]}"


def test_the_rayservice_is_what_its_crd_describes(crd: Any) -> None:
    assert list(faults(crd, load(RAYSERVICE))) == []


@pytest.mark.parametrize("key", ["serveConfigV3", "rayClusterConfig.headGroupSpecs", "rayClusterConfig.rayVersion"])
def test_the_crd_finds_faults(crd: Any, key: str) -> None:
    manifest = deepcopy(load(RAYSERVICE))
    *parents, last = key.split(".")
    spec = manifest["spec"]
    for parent in parents:
        spec = spec[parent]
    spec[last] = ["of no use"]
    assert any(last in fault for fault in faults(crd, manifest))


def test_the_rayservice_serves_an_example() -> None:
    """What differs: the API is open to the Kubernetes cluster's network, as its service needs."""
    embedded = yaml.safe_load(load(RAYSERVICE)["spec"]["serveConfigV2"])
    example = load(ROOT / "configs/llama4-scout.yaml")
    assert embedded["http_options"].pop("host") == "0.0.0.0"
    assert example["http_options"].pop("host") == "127.0.0.1"
    assert embedded == example
    ServeDeploySchema.model_validate(embedded)


def test_the_rayservice_has_the_gpus_that_the_plan_counts() -> None:
    [planned] = plan(ROOT / "configs/llama4-scout.yaml", Given())
    groups = load(RAYSERVICE)["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    gpus = [
        group["replicas"] * int(container["resources"]["limits"]["nvidia.com/gpu"])
        for group in groups
        for container in group["template"]["spec"]["containers"]
    ]
    assert sum(gpus) == planned.gpus


def test_the_launcher_yaml_is_what_ray_up_takes() -> None:
    written = load(LAUNCHER)
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(written, schema)
    validate_config(prepare_config(written) | {"cluster_synced_files": []})
    with pytest.raises(jsonschema.ValidationError, match="head_start_ray_command'"):
        jsonschema.validate(written | {"head_start_ray_command": []}, schema)


@pytest.mark.parametrize("commands", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_the_launcher_starts_ray_with_its_own_options_and_authentication(commands: str) -> None:
    *_, command = load(LAUNCHER)[commands]
    environment, _, arguments = command.partition("~/moray/.venv/bin/ray start ")
    assert "RAY_AUTH_MODE=token" in environment
    known = {option for parameter in start.params for option in parameter.opts}
    assert {argument.partition("=")[0] for argument in arguments.split()} <= known
