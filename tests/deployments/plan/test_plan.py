import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.config import ROOT, ConfigError, EngineConfig
from deployments.plan.fit import Memory, check
from deployments.plan.needs import Layout, Model
from deployments.plan.plan import Given, plan
from model.args import ModelArgs

SMALL: dict[str, Any] = {
    "dim": 64, "n_layers": 4, "n_heads": 8, "n_kv_heads": 4, "vocab_size": 4096, "ffn_hidden_dim": 128,
    "max_seq_len": 1024, "moe_args": {"num_experts": 8, "hidden_dim": 512},
}  # fmt: skip
EXPERT = 3 * 64 * 512 * 2


def serve_yaml(folder: Path, deployments: dict[str, Any] | None = None, **model: Any) -> Path:
    """A Serve YAML of one model of the small architecture, which lies beside it."""
    (folder / "small.yaml").write_text(yaml.safe_dump({"args": SMALL}))
    named = [{"name": name, **said} for name, said in (deployments or {}).items()]
    application = {
        "name": "moray",
        "import_path": "deployments.app:build",
        "args": {"models": [{"id": "m", "path": str(folder / "small.yaml")} | model]},
        "deployments": named,
    }
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump({"applications": [application]}))
    return path


def with_experts(servers: int = 2, memory: int | None = None) -> dict[str, Any]:
    options = {} if memory is None else {"ray_actor_options": {"memory": memory}}
    return {"experts-m": {"num_replicas": servers, **options}}


def faults(path: Path, **given: Any) -> list[str]:
    [planned] = plan(path, Given(**given))
    return [f"{fault.what}: {fault.remedy}" for fault in planned.faults]


def test_experts_are_shared_out_over_their_servers(tmp_path: Path) -> None:
    [planned] = plan(serve_yaml(tmp_path, with_experts(3), experts={"copies": 2}), Given())
    assert planned.needs is not None
    experts = planned.needs.experts
    assert experts is not None
    assert (experts.num_experts, experts.each, experts.most_experts) == (32, EXPERT, 22)
    [without] = plan(serve_yaml(tmp_path), Given())
    assert without.needs is not None
    assert without.needs.ranks[0].weights - planned.needs.ranks[0].weights == 32 * EXPERT


def test_too_little_memory_names_the_server_and_how_many_would_do(tmp_path: Path) -> None:
    path = serve_yaml(tmp_path, with_experts(2, memory=20 * EXPERT), experts={"copies": 2})
    [fault] = faults(path, headroom=0.0)
    assert "an expert server needs" in fault
    assert "32 of 32 experts" in fault
    assert "set num_replicas of the experts to 4, or copies to 1" in fault
    assert faults(serve_yaml(tmp_path, with_experts(4, memory=20 * EXPERT), experts={"copies": 2}), headroom=0.0) == []


def test_more_copies_than_servers(tmp_path: Path) -> None:
    [fault] = faults(serve_yaml(tmp_path, with_experts(1), experts={"copies": 2}))
    assert "set num_replicas of the experts to at least 2, or copies to 1" in fault


def test_the_remedy_for_a_rank_is_the_narrowest_split_that_fits(tmp_path: Path) -> None:
    path = serve_yaml(tmp_path, engine={"max_model_len": 64})
    [planned] = plan(path, Given())
    assert planned.needs is not None
    half = int(planned.needs.ranks[0].fixed * 0.6)
    [fault] = faults(path, host_memory=half, headroom=0.0)
    assert "a rank of stage 0 needs" in fault
    assert "set tensor_parallel_size to 2 and pipeline_parallel_size to 1" in fault
    wider = serve_yaml(tmp_path, engine={"max_model_len": 64, "tensor_parallel_size": 2})
    assert faults(wider, host_memory=half, headroom=0.0) == []


def test_a_proposed_split_fits() -> None:
    """Whatever the memory, following the remedy leads to a plan without faults."""
    model = Model(ModelArgs.model_validate(SMALL), EngineConfig(max_model_len=64))
    proposed = set()
    for memory in (Memory(rank=50_000 * step, server=None, headroom=0.0) for step in range(1, 200)):
        _, found = check(model, Layout(), memory)
        for words in (
            fault.remedy.removeprefix("set ").split() for fault in found if "tensor_parallel_size to" in fault.remedy
        ):
            layout = Layout(int(words[2]), int(words[-1]))
            assert check(model, layout, memory)[1] == []
            proposed.add((layout.tensor_parallel_size, layout.pipeline_parallel_size))
    assert {(2, 1), (4, 1), (4, 2)} <= proposed


def test_too_many_keys_and_values(tmp_path: Path) -> None:
    path = serve_yaml(tmp_path, engine={"kv_cache_memory": "1GiB"})
    [fault] = faults(path, host_memory=2**29, headroom=0.0)
    assert "keys and values 1.00 GiB" in fault
    assert "set kv_cache_memory to at most 504." in fault


def test_a_cache_too_small_for_one_sequence(tmp_path: Path) -> None:
    [fault] = faults(serve_yaml(tmp_path, engine={"kv_cache_memory": 4 * 2 * 32 * 2 * 512}))
    assert "fewer than max_model_len (1,024)" in fault
    assert "set max_model_len to at most 512" in fault


def test_a_size_that_does_not_divide(tmp_path: Path) -> None:
    [fault] = faults(serve_yaml(tmp_path, engine={"tensor_parallel_size": 3}))
    assert (
        fault == "tensor_parallel_size 3 does not divide the model (these do: 1, 2, 4): set tensor_parallel_size to 4"
    )


def test_more_stages_than_layers(tmp_path: Path) -> None:
    [fault] = faults(serve_yaml(tmp_path, engine={"pipeline_parallel_size": 5}))
    assert "set pipeline_parallel_size to at most 4" in fault


def test_a_shared_gpu_gives_its_part(tmp_path: Path) -> None:
    options = {"engine-m": {"ray_actor_options": {"num_gpus": 0.5, "accelerator_type": "L4"}}}
    [planned] = plan(serve_yaml(tmp_path, options), Given())
    assert planned.memory.rank == 12 * 10**9
    assert planned.gpus == 0.5


@pytest.mark.parametrize(
    ("deployments", "model", "message"),
    [
        (with_experts(), {}, "add `experts: {copies: 2}`"),
        ({}, {"path": "hf://org/unknown"}, "--architecture m=PATH"),
        ({}, {"engine": {"tensor_parallel": 2}}, "did you mean 'tensor_parallel_size'"),
    ],
)
def test_faulty_configuration(tmp_path: Path, deployments: dict[str, Any], model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(serve_yaml(tmp_path, deployments, **model), Given())


def test_a_checkpoint_without_weights_is_enough(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text(json.dumps(SMALL))
    [planned] = plan(serve_yaml(tmp_path, path=str(tmp_path)), Given())
    [same] = plan(serve_yaml(tmp_path), Given())
    assert planned.needs == same.needs


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deployments.plan", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, timeout=100)


def test_the_command(tmp_path: Path) -> None:
    path = str(serve_yaml(tmp_path, with_experts(2, memory=20 * EXPERT), experts={"copies": 2}))
    told = _run(path, "--headroom", "0")
    assert told.returncode == 1
    assert "Nearest remedy: set num_replicas of the experts to 4" in told.stdout
    fitting = _run(path, "--headroom", "0", "--json", "--architecture", f"m={tmp_path}/small.yaml")
    assert fitting.returncode == 1
    [model] = json.loads(fitting.stdout)["models"]
    assert model["needs"]["experts"]["most"] == 32 * EXPERT
    assert model["fits"] is False
    absent = _run("absent.yaml")
    assert absent.returncode == 2
    assert "absent.yaml" in absent.stderr
