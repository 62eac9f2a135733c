"""Where a location is on this machine: a path as it is, `hf://` after a download from the Hugging Face hub."""

import re
from collections.abc import Sequence
from pathlib import Path

from model.checkpoint.errors import CheckpointError

SCHEME = "hf://"
_ADDRESS = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja")
ARCHITECTURE_FILES = ("config.json",)
"""All that a process needs which holds no weights."""
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template*",
    "config.json",
    "generation_config.json",
)
_OTHER_COPIES = ["original/*", "onnx/*", "consolidated*"]


def local_path(location: str | Path, files: Sequence[str] = MODEL_FILES) -> Path:
    """The path of `location`; of `hf://org/name[@revision]`, `files` are downloaded, or found in the hub's cache.

    With `HF_HUB_OFFLINE=1`, or without a network, only the cache is looked at. `HF_TOKEN` opens
    gated repositories. Raises CheckpointError when it is to be had from neither.
    """
    if not isinstance(location, str) or not location.startswith(SCHEME):
        return Path(location).expanduser()
    address = _ADDRESS.fullmatch(location.removeprefix(SCHEME))
    if address is None:
        raise CheckpointError(f"{location!r} is not of the form hf://org/name or hf://org/name@revision")
    # A fifth of a second that only these locations need.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                address["repo"], revision=address["revision"], allow_patterns=list(files), ignore_patterns=_OTHER_COPIES
            )
        )
    except LocalEntryNotFoundError as error:
        raise CheckpointError(f"{location} is not in the local cache, and the hub is out of reach: {error}") from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(f"{location} cannot be downloaded: {error}") from error
