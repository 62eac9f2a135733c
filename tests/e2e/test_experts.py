"""Expert servers behind HTTP: one is killed, one freezes, their number changes; no client sees more than a pause."""

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from benchmarks.soak_experts import CONFIG, Disturbance, Target, load, prompts_of, serve_config, soak
from tests.stack import ROOT, Stack

MODEL = "smollm2-moe"

pytestmark = pytest.mark.skipif(
    not (ROOT / "models" / MODEL / "config.json").is_file(), reason=f"models/{MODEL} is not there: `make test` makes it"
)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("experts"), serve_config())
    stack.start()
    yield stack
    stack.stop()


@pytest.mark.timeout(280)
async def test_a_death_and_a_freeze_cost_nothing(stack: Stack) -> None:
    target, disturbance = Target(stack, MODEL), Disturbance()
    signals = [int(signal.SIGKILL), int(signal.SIGSTOP)]
    report = await soak(target, lambda: disturbance.run(target, 20, 2, signals), seconds=40, calm_seconds=15)
    print(report, disturbance.restored)
    assert report["requests"] > 10
    assert report["lost"] == report["changed"] == report["several_answers"] == 0
    assert report["failovers"] >= 1
    assert max(disturbance.restored) < 15
    assert report["longest_ms"] < report["calm_p99_ms"] + 1000  # 300 on a quiet machine: `make soak-experts`


@pytest.mark.timeout(600)
async def test_their_number_changes_under_load(stack: Stack, tmp_path: Path) -> None:
    """2 -> 6 -> 3 by `serve deploy`."""
    target = Target(stack, MODEL)
    prompts = prompts_of(target.model, 16)
    calm = await load(target.url, MODEL, prompts, 8, 0, 8)
    loading = asyncio.create_task(load(target.url, MODEL, prompts, 8, 2, 90))
    for count in (2, 6, 3):
        await asyncio.to_thread(deploy, stack, tmp_path / "changed.yaml", count)
        await asyncio.to_thread(wait_for_servers, target, count)
    rough = await loading
    assert not rough.lost
    assert rough.num_answers > 10
    assert all(rough.tokens[prompt] == calm.tokens[prompt] for prompt in rough.tokens if prompt in calm.tokens)
    assert not any(len(answers) > 1 for answers in rough.tokens.values())


def deploy(stack: Stack, path: Path, num_servers: int) -> None:
    line = next(line for line in stack.log.read_text().splitlines() if "serve deploy" in line)
    config = yaml.safe_load(stack.config.read_text())
    for deployment in config["applications"][0]["deployments"]:
        if deployment["name"].startswith("experts-"):
            deployment["num_replicas"] = num_servers
    path.write_text(yaml.safe_dump(config))
    dashboard = line.split(" -a ")[1].split()[0]
    command = [str(Path(sys.executable).with_name("serve")), "deploy", "-a", dashboard, str(path)]
    environment = stack.environment | {"RAY_AUTH_MODE": "token"}
    subprocess.run(command, check=True, env=environment, capture_output=True, cwd=ROOT)


def wait_for_servers(target: Target, count: int) -> None:
    deadline = time.monotonic() + 150  # four new processes import torch beside the load
    while target.num_servers() != count or target.fewest_copies() < 2:
        assert time.monotonic() < deadline, f"not {count} servers with two copies of everything"
        time.sleep(1)


def test_the_example_is_what_is_tested() -> None:
    experts = yaml.safe_load(CONFIG.read_text())["applications"][0]["deployments"][-1]
    assert experts["num_replicas"] == 4
