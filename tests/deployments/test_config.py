from pathlib import Path
from typing import Any

import pytest

from deployments.config import ROOT, ConfigError, read


def args(**model: Any) -> dict[str, Any]:
    return {"models": [{"id": "m", "path": "pyproject.toml"} | model]}


def test_relative_paths_start_at_the_working_directory_or_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert read(args()).models[0].path == str(ROOT / "pyproject.toml")
    (tmp_path / "pyproject.toml").touch()
    assert read(args()).models[0].path == str(tmp_path / "pyproject.toml")


def test_hub_locations_stay() -> None:
    assert read(args(path="hf://org/name")).models[0].path == "hf://org/name"


@pytest.mark.parametrize(
    ("faulty", "message"),
    [
        (args(path="absent.gguf"), "path of model 'm': there is no .*absent.gguf"),
        (
            args(engine={"max_num_seq": 3}),
            r"engine: unknown key 'max_num_seq'; did you mean 'max_num_seqs'",
        ),
        (args(engine={"block_size": -1}), r"models\[0\]\.engine\.block_size: .*greater than 0 \(is -1\)"),
        (args(experts={"copy": 2}), r"experts: unknown key 'copy'; did you mean 'copies'"),
        (args(experts={"copies": 0}), r"experts\.copies: .*greater than 0 \(is 0\)"),
        (
            args(engine={"bundle_per_rank": {"CPU": 4}}),
            r"models\[0\]\.engine: bundle_per_rank has no effect on one rank .*ray_actor_options",
        ),
        (args(engine={"rank_timeout_s": 5}), r"rank_timeout_s has no effect on one rank .*front.heartbeat_timeout_s"),
        (args(engine={"wait_for_nodes": True}), r"wait_for_nodes has no effect on one rank"),
        (args(id="a/b"), r"models\[0\]\.id"),
        ({"models": []}, "models"),
        ({"models": args()["models"] * 2}, "two models have the same id: m, m"),
    ],
)
def test_a_fault_names_its_key(faulty: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(faulty)
