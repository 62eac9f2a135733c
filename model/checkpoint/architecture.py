"""The architecture at a location, for which no weight needs to be there."""

from pathlib import Path

import yaml
from pydantic import ValidationError

from model.args import ModelArgs
from model.checkpoint import gguf, huggingface, meta
from model.checkpoint.errors import CheckpointError


def read_args(path: Path) -> ModelArgs:
    """ModelArgs of a GGUF file, of a folder with config.json or params.json, or of a model YAML.

    A model YAML has ModelArgs' fields under `args`. Raises CheckpointError when nothing of that
    is there, or it describes no model that can be served.
    """
    if path.suffix in (".yaml", ".yml"):
        return _of_yaml(path)
    if path.is_file():
        if gguf.is_gguf(path):
            return gguf.open_gguf(path).args
        raise CheckpointError(f"{path} is neither a GGUF file nor a model YAML")
    if (path / "config.json").is_file():
        return huggingface.read_args(path / "config.json")
    if (path / "params.json").is_file():
        return meta.read_args(path)
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return gguf.open_gguf(files[0]).args
    raise CheckpointError(f"{path} has no config.json, no params.json and no single .gguf file")


def _of_yaml(path: Path) -> ModelArgs:
    try:
        return ModelArgs.model_validate(yaml.safe_load(path.read_text(encoding="utf-8"))["args"])
    except (OSError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except (KeyError, TypeError):
        raise CheckpointError(f"{path} is not a model YAML: it has no `args`") from None
    except ValidationError as error:
        raise CheckpointError(f"{path} does not describe a valid model: {error}") from error
