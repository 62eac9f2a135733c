"""Llama 1 to 4 as Meta publishes them: params.json beside consolidated.*.pth, one file for each rank of training.

Old names are meta_names.py's. How many files there are has nothing to do with how many ranks serve:
each tensor is the join of its parts.
"""

import io
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.args import ModelArgs
from model.checkpoint.checkpoint import Checkpoint
from model.checkpoint.config import model_args, read_json, required
from model.checkpoint.errors import CheckpointError
from model.checkpoint.meta_names import current
from model.checkpoint.slices import split_dim
from model.checkpoint.source import Joined, Mapped, TensorSource
from model.load_hooks import is_leftover

_SHARD = re.compile(r"consolidated\.(\d+)\.pth")
_EMBEDDING = "tok_embeddings.weight"
_SHAPE = {"dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "vocab_size", "tie_word_embeddings", "norm_eps"}
_HIDDEN_WIDTH = {"ffn_hidden_dim", "multiple_of", "ffn_dim_multiplier", "ffn_exp"}
_ROPE = {
    "rope_theta",
    "use_scaled_rope",
    "rope_scaling_factor",
    "rope_low_freq_factor",
    "rope_high_freq_factor",
    "rope_original_max_len",
}
_LLAMA_4 = {
    "attention_chunk_size",
    "nope_layer_interval",
    "use_qk_norm",
    "attn_temperature_tuning",
    "floor_scale",
    "attn_scale",
    "moe_args",
    "vision_args",
}
_KEYS = _SHAPE | _HIDDEN_WIDTH | _ROPE | _LLAMA_4 | {"max_seq_len"}
_NOT_OF_THE_MODEL = ("max_batch_size",)
_LLAMA_3_2 = ((2048, 16), (3072, 28))
"""dim and n_layers of 1B and 3B, which stretch their rotations by 32; params.json does not tell."""


def open_meta(folder: Path) -> Checkpoint:
    """Opens the Llama model in `folder`."""
    origin = folder / "params.json"
    params = read_json(origin)
    for key in ("dim", "n_layers", "n_heads"):
        required(params, key, origin)
    shards = [current(_read_shard(path), params) for path in _files(folder)]
    _check_same_names(shards, folder)
    sources = {name: _source(name, [shard[name] for shard in shards], params) for name in shards[0]}
    if _EMBEDDING not in sources:
        raise CheckpointError(f"{folder} has no tensor {_EMBEDDING}")
    return Checkpoint(str(folder), _args(params, origin, sources), sources)


def read_args(folder: Path) -> ModelArgs:
    """What the params.json in `folder` describes; where it leaves it to the weights, they must be there."""
    origin = folder / "params.json"
    params = read_json(origin)
    if any(_SHARD.fullmatch(path.name) for path in folder.iterdir()):
        return open_meta(folder).args
    if params.get("vocab_size", -1) < 0:
        raise CheckpointError(f"{origin} has no vocab_size, and no consolidated.*.pth is there to tell")
    return _args({"tie_word_embeddings": False, **params}, origin, {})


def _files(folder: Path) -> list[Path]:
    numbered = {int(match[1]): path for path in folder.iterdir() if (match := _SHARD.fullmatch(path.name))}
    if not numbered:
        raise CheckpointError(f"{folder} has a params.json but no consolidated.*.pth")
    missing = [number for number in range(max(numbered) + 1) if number not in numbered]
    if missing:
        raise CheckpointError(f"{folder} lacks consolidated files number {', '.join(map(str, missing))}")
    return [numbered[number] for number in sorted(numbered)]


def _read_shard(path: Path) -> dict[str, TensorSource]:
    try:
        with torch.serialization.safe_globals([io.BytesIO, bytes]):  # `_extra_state` is bytes
            tensors = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
    except (RuntimeError, OSError, pickle.UnpicklingError, EOFError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if isinstance(tensors, dict):
        tensors = {name: value for name, value in tensors.items() if not (is_leftover(name) or _is_empty(value))}
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise CheckpointError(f"{path} is not a dictionary of tensors")
    unsupported = [name for name, tensor in tensors.items() if not tensor.is_floating_point()]
    if unsupported:
        raise CheckpointError(f"{path}: quantized tensors are not supported: {', '.join(unsupported[:10])}")
    return {name: Mapped(tensor) for name, tensor in tensors.items()}


def _is_empty(value: object) -> bool:
    return isinstance(value, Tensor) and value.shape == (0,)


def _check_same_names(shards: list[dict[str, TensorSource]], folder: Path) -> None:
    everywhere = set.intersection(*(set(shard) for shard in shards))
    somewhere = set.union(*(set(shard) for shard in shards))
    if somewhere != everywhere:
        names = ", ".join(sorted(somewhere - everywhere)[:20])
        raise CheckpointError(f"{folder}: these tensors are in some of its files, but not in all: {names}")


def _source(name: str, parts: list[TensorSource], params: Mapping[str, Any]) -> TensorSource:
    if len(parts) == 1:
        return parts[0]
    try:
        dim = split_dim(name)
    except CheckpointError:
        dim = None  # not a tensor of a Llama: to be reported with its name on loading
    if name == _EMBEDDING and parts[0].shape[1] != params["dim"]:
        dim = 1  # Llama 1 and 2 split the embedding by columns, 3 by rows
    return parts[0] if dim is None or len(parts[0].shape) <= dim else Joined(tuple(parts), dim)


def _args(params: dict[str, Any], origin: Path, sources: dict[str, TensorSource]) -> ModelArgs:
    fields = {key: value for key, value in params.items() if key not in _NOT_OF_THE_MODEL and value is not None}
    unknown = sorted(set(fields) - _KEYS)
    if unknown:
        raise CheckpointError(f"{origin}: not supported: {', '.join(unknown)}")
    if fields.get("vocab_size", -1) < 0:
        fields["vocab_size"] = sources[_EMBEDDING].shape[0]
    fields.setdefault("tie_word_embeddings", "output.weight" not in sources)
    return model_args(origin, **_with_era(fields))


def _with_era(fields: dict[str, Any]) -> dict[str, Any]:
    """Adds what params.json leaves to the code of its time: Llama 2's, 3's, 3.1's or 4's.

    Of Llama 4, Scout's instruction-tuned model alone scales its rotations, and goes to ten million
    tokens; of the others, which params.json does not tell apart, this takes the shortest context.
    """
    if _LLAMA_4 & fields.keys():
        scaling = {"rope_scaling_factor": 16.0, "rope_low_freq_factor": 1.0, "rope_high_freq_factor": 1.0}
        era: dict[str, Any] = {"max_seq_len": 10485760 if fields.get("use_scaled_rope") else 262144, **scaling}
    elif "rope_theta" not in fields:
        era = {"rope_theta": 10000.0, "max_seq_len": 4096}
    elif not fields.get("use_scaled_rope"):
        era = {"max_seq_len": 8192}
    else:
        size = (fields["dim"], fields["n_layers"])
        era = {
            "max_seq_len": 131072,
            "rope_scaling_factor": 32.0 if size in _LLAMA_3_2 else 8.0,
            "rope_low_freq_factor": 1.0,
            "rope_high_freq_factor": 4.0,
            "rope_original_max_len": 8192,
        }
    return era | fields
