"""Models as `transformers` saves them: config.json beside safetensors files.

What the settings mean is huggingface_config.py's, what the tensors mean huggingface_names.py's.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.args import ModelArgs
from model.checkpoint.checkpoint import Checkpoint
from model.checkpoint.config import read_json, required
from model.checkpoint.errors import CheckpointError
from model.checkpoint.huggingface_config import ARCHITECTURES, Architecture, args_of
from model.checkpoint.huggingface_names import meta_sources
from model.checkpoint.source import Mapped

_INDEX = "model.safetensors.index.json"
_HEAD = "lm_head.weight"
_DERIVED = ("rotary_emb.inv_freq", "rotary_embedding.freqs_ci")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def open_huggingface(folder: Path) -> Checkpoint:
    """Opens the model in `folder`."""
    origin = folder / "config.json"
    architecture = _architecture(read_json(origin), origin)
    args = read_args(origin)
    stored = {
        name: Mapped(tensor)
        for name, tensor in _tensors(folder).items()
        if not name.endswith(_DERIVED) and not (name.endswith(_HEAD) and args.tie_word_embeddings)
    }
    try:
        return Checkpoint(str(folder), args, meta_sources(stored, args, halves=architecture.halves))
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def read_args(origin: Path) -> ModelArgs:
    """What the config.json at `origin` describes; no weights need to be there."""
    config = read_json(origin)
    return args_of(config, _architecture(config, origin), origin)


def _architecture(config: dict[str, Any], origin: Path) -> Architecture:
    names = config.get("architectures") or ["LlamaForCausalLM"]
    if len(names) != 1 or names[0] not in ARCHITECTURES:
        raise CheckpointError(f"{origin}: {', '.join(names)} is not supported, only {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[names[0]]


def _tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors, memory-mapped."""
    tensors: dict[str, Tensor] = {}
    for path in _files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
    unsupported = [f"{name} ({tensor.dtype})" for name, tensor in tensors.items() if tensor.dtype not in _FLOATS]
    if unsupported:
        raise CheckpointError(f"{folder}: tensors of unsupported types: {', '.join(unsupported[:10])}")
    return tensors


def _files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if index.is_file():
        files = [folder / name for name in sorted(set(required(read_json(index), "weight_map", index).values()))]
    elif (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    else:
        files = sorted(folder.glob("*.safetensors"))
        if len(files) > 1:
            raise CheckpointError(f"{folder} has several safetensors files, but no {_INDEX} to say which to take")
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks files that its index names: {', '.join(missing)}; download them again")
    return files
