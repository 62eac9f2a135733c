"""A launch that is refused leaves nothing behind. What it starts is tested in tests/e2e."""

import os
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from deployments import launch
from deployments.config import ConfigError


@pytest.mark.parametrize(
    ("config", "refusal"),
    [
        ({"unknown": 1}, ValidationError),
        (
            {"applications": [{"name": "a", "import_path": "deployments.app:build", "args": {"models": 5}}]},
            ConfigError,
        ),
    ],
)
def test_a_refused_yaml_leaves_no_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: object, refusal: type[Exception]
) -> None:
    directory = tmp_path / "run"

    def made() -> Path:
        directory.mkdir()
        return directory

    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(launch, "new_directory", made)
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(refusal):
        launch.Launch(path)
    assert not directory.exists()
