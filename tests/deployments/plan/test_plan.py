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


def test_experts_are_shared_out_over_their_servers_layer_by_layer(tmp_path: Path) -> None:
    [planned] = plan(serve_yaml(tmp_path, with_experts(3), experts={"copies": 2}), Given())
    assert planned.needs is not None
    experts = planned.needs.experts
    assert experts is not None
    assert (experts.layers, experts.per_layer, experts.each) == (4, 8, EXPERT)
    assert (experts.least, experts.most) == (4 * 6, 4 * 6)
    [without] = plan(serve_yaml(tmp_path), Given())
    assert without.needs is not None
    assert without.needs.ranks[0].weights - planned.needs.ranks[0].weights == 32 * EXPERT


def test_without_a_deployment_there_is_a_server_for_each_copy(tmp_path: Path) -> None:
    [planned] = plan(serve_yaml(tmp_path, experts={"copies": 3}), Given())
    assert planned.layout.servers == 3


def test_the_fewest_of_autoscaled_servers_must_hold_all_copies(tmp_path: Path) -> None:
    autoscaled = {"experts-m": {"autoscaling_config": {"min_replicas": 2, "max_replicas": 5}}}
    [planned] = plan(serve_yaml(tmp_path, autoscaled, experts={"copies": 2}), Given())
    assert planned.layout.servers == 2
    [fault] = faults(serve_yaml(tmp_path, autoscaled, experts={"copies": 3}))
    assert "3 copies of every expert need as many servers, there are 2" in fault


def test_too_little_memory_names_the_server_and_how_many_would_do(tmp_path: Path) -> None:
    path = serve_yaml(tmp_path, with_experts(2, memory=20 * EXPERT), experts={"copies": 2})
    [fault] = faults(path, headroom=0.0)
    assert "an expert server takes 6.00 MiB (32 experts of 192.00 KiB)" in fault
    assert "set num_replicas of the experts to 4" in fault
    assert faults(serve_yaml(tmp_path, with_experts(4, memory=20 * EXPERT), experts={"copies": 2}), headroom=0.0) == []


def test_room_for_spare_copies_gives_way_to_what_must_fit(tmp_path: Path) -> None:
    """Of 4 servers each must hold 4 of a layer's 8 experts, and takes 5 if it may."""
    path = serve_yaml(tmp_path, with_experts(4, memory=17 * EXPERT), experts={"copies": 2})
    [fault] = faults(path, headroom=0.0)
    assert "set experts.memory to at most 3.18 MiB" in fault
    bounded = {"copies": 2, "memory": 17 * EXPERT}
    assert faults(serve_yaml(tmp_path, with_experts(4, memory=17 * EXPERT), experts=bounded), headroom=0.0) == []


def test_experts_memory_that_does_not_hold_the_copies(tmp_path: Path) -> None:
    [fault] = faults(serve_yaml(tmp_path, with_experts(4), experts={"copies": 2, "memory": 15 * EXPERT}))
    assert "holds 15 experts; 2 copies of all need room for 16 on each of 4 servers" in fault
    assert "set experts.memory to at least 3.00 MiB, or num_replicas of the experts to 6" in fault


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


def test_ranks_of_a_group_have_what_their_bundle_asks_for(tmp_path: Path) -> None:
    engine = {"tensor_parallel_size": 2, "bundle_per_rank": {"CPU": 1, "GPU": 1, "accelerator_type:H200": 0.001}}
    [planned] = plan(serve_yaml(tmp_path, {"engine-m": {"num_replicas": 3}}, engine=engine), Given())
    assert planned.memory.rank == 141 * 10**9
    assert planned.gpus == 6
    on_cpus = {"tensor_parallel_size": 2, "bundle_per_rank": {"CPU": 1, "memory": 10**6}}
    assert "a rank of stage 0 needs" in faults(serve_yaml(tmp_path, engine=on_cpus))[0]


def test_kv_cache_memory_is_of_all_ranks_together(tmp_path: Path) -> None:
    per_token = 4 * 2 * 32 * 2
    for layout in ({}, {"tensor_parallel_size": 2}, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}):
        [planned] = plan(serve_yaml(tmp_path, engine={"kv_cache_memory": 2048 * per_token, **layout}), Given())
        assert planned.kv_tokens == 2048


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
    assert model["needs"]["experts"]["most_bytes"] == 32 * EXPERT
    assert model["fits"] is False
    absent = _run("absent.yaml")
    assert absent.returncode == 2
    assert "absent.yaml" in absent.stderr
