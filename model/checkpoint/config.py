"""Reading the JSON and key-value settings that come with weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from model.args import ModelArgs
from model.checkpoint.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return content


def required(settings: Mapping[str, Any], key: str, origin: Path) -> Any:
    """`settings[key]`; CheckpointError when it is not there."""
    if settings.get(key) is None:
        raise CheckpointError(f"{origin} has no {key}")
    return settings[key]


def refuse(settings: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]], origin: Path) -> None:
    """CheckpointError that names every setting which is there, and is none of its neutral values."""
    unsupported = [
        f"{key} = {settings[key]!r}"
        for key, values in neutral.items()
        if settings.get(key) is not None and settings[key] not in values
    ]
    if unsupported:
        raise CheckpointError(f"{origin}: not supported: {', '.join(unsupported)}")


def model_args(origin: Path, **fields: Any) -> ModelArgs:
    """ModelArgs of `fields`, those that are None left at their defaults."""
    try:
        return ModelArgs(**{name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        raise CheckpointError(f"{origin} does not describe a valid model: {error}") from error
