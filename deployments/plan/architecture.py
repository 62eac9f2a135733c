"""The architecture of a model that a YAML names: from its checkpoint, or as published (configs/models/)."""

from pathlib import Path

import yaml

from deployments.config import ROOT, ConfigError, ModelConfig
from model.args import ModelArgs
from model.checkpoint.architecture import read_args
from model.checkpoint.errors import CheckpointError
from model.checkpoint.hub import SCHEME

PUBLISHED = ROOT / "configs/models"


def architecture(model: ModelConfig, given: Path | None = None) -> tuple[ModelArgs, str]:
    """ModelArgs of `model`, and where they are from. `given`: a file or folder that replaces the YAML's path.

    Nothing is downloaded. Raises ConfigError.
    """
    place = given or _place(model)
    try:
        return read_args(place), str(place)
    except CheckpointError as error:
        raise ConfigError(f"model {model.id!r}: {error}") from None


def _place(model: ModelConfig) -> Path:
    """A checkpoint on this machine, or else the model YAML that lists it."""
    if not model.path.startswith(SCHEME):
        path = Path(model.path).expanduser()
        found = next((start / path for start in (Path.cwd(), ROOT) if (start / path).exists()), None)
        if found is not None:
            return found
    else:
        address = model.path.removeprefix(SCHEME)
        if (cached := _cached(address)) or (cached := _published(address)):
            return cached
    raise ConfigError(
        f"model {model.id!r}: {model.path} is not on this machine, and no file in configs/{PUBLISHED.name}/ lists it. "
        f"Give its config.json's folder, or a model YAML: --architecture {model.id}=PATH"
    )


def _cached(address: str) -> Path | None:
    """The folder of the hub's cache that holds the model's config.json."""
    from huggingface_hub import try_to_load_from_cache

    repository, _, revision = address.partition("@")
    path = try_to_load_from_cache(repository, "config.json", revision=revision or None)
    return Path(path).parent if isinstance(path, str) else None


def _published(address: str) -> Path | None:
    repository = address.partition("@")[0]
    for path in sorted(PUBLISHED.glob("*.yaml")):
        if repository in yaml.safe_load(path.read_text(encoding="utf-8")).get("checkpoints", ()):
            return path
    return None
