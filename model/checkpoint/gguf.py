"""Llama models in GGUF files. Their rotary pairs are interleaved like Meta's: only names differ.

Names and keys: https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/constants.py
"""

import re
from pathlib import Path
from typing import Any

from model.args import ModelArgs
from model.checkpoint.checkpoint import Checkpoint
from model.checkpoint.config import model_args, refuse, required
from model.checkpoint.errors import CheckpointError
from model.checkpoint.gguf_file import MAGIC, GGUFFile, StoredTensor, read_gguf
from model.checkpoint.quantized import SUPPORTED_TYPES, stored_source
from model.checkpoint.rope_factors import rope_fields

_NAMES = {
    "token_embd.weight": "tok_embeddings.weight",
    "output_norm.weight": "norm.weight",
    "output.weight": "output.weight",
}
_LAYER_NAMES = {
    "attn_q.weight": "attention.wq.weight",
    "attn_k.weight": "attention.wk.weight",
    "attn_v.weight": "attention.wv.weight",
    "attn_output.weight": "attention.wo.weight",
    "attn_norm.weight": "attention_norm.weight",
    "ffn_gate.weight": "feed_forward.w1.weight",
    "ffn_down.weight": "feed_forward.w2.weight",
    "ffn_up.weight": "feed_forward.w3.weight",
    "ffn_norm.weight": "ffn_norm.weight",
}
_LAYER = re.compile(r"blk\.(\d+)\.(.+)")
_ROPE_FACTORS = "rope_freqs.weight"
_NEUTRAL = {
    "llama.expert_count": (0,),
    "llama.attention.sliding_window": (0,),
    "llama.attention.causal": (True,),
    "llama.attention.scale": (0.0,),
    "llama.attention.clamp_kqv": (0.0,),
    "llama.use_parallel_residual": (False,),
    "llama.logit_scale": (0.0, 1.0),
    "llama.residual_scale": (0.0, 1.0),
    "llama.embedding_scale": (0.0, 1.0),
    "llama.rope.scale_linear": (1.0,),
    "split.count": (0, 1),
}


def is_gguf(path: Path) -> bool:
    """Whether the file at `path` says that it is one."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def open_gguf(path: Path) -> Checkpoint:
    """Opens the Llama model in the GGUF file at `path`."""
    file = read_gguf(path)
    _check_types(file, path)
    args = _args(file, path)
    sources = {
        _canonical(name): stored_source(stored) for name, stored in file.tensors.items() if name != _ROPE_FACTORS
    }
    return Checkpoint(str(path), args, sources)


def _canonical(name: str) -> str:
    """Meta's name of a tensor, or its own when Meta has none."""
    if layer := _LAYER.fullmatch(name):
        return f"layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}" if layer[2] in _LAYER_NAMES else name
    return _NAMES.get(name, name)


def _check_types(file: GGUFFile, path: Path) -> None:
    unsupported = [f"{name} ({t.type.name})" for name, t in file.tensors.items() if t.type not in SUPPORTED_TYPES]
    if unsupported:
        known = ", ".join(sorted(kind.name for kind in SUPPORTED_TYPES))
        raise CheckpointError(
            f"{path}: {len(unsupported)} tensors are of unsupported types, such as {', '.join(unsupported[:5])}. "
            f"Supported are {known}"
        )


def _args(file: GGUFFile, path: Path) -> ModelArgs:
    settings = file.metadata
    architecture = required(settings, "general.architecture", path)
    if architecture != "llama":
        raise CheckpointError(f"{path}: architecture {architecture!r} is not supported, only 'llama'")
    refuse(settings, _NEUTRAL, path)
    embedding = _tensor(file, "token_embd.weight", path)
    n_heads = required(settings, "llama.attention.head_count", path)
    if not isinstance(n_heads, int) or n_heads < 1:
        raise CheckpointError(f"{path}: llama.attention.head_count = {n_heads!r} is not one number for all layers")
    head_dim = _head_dim(settings, path, n_heads)
    return model_args(
        path,
        dim=required(settings, "llama.embedding_length", path),
        n_layers=required(settings, "llama.block_count", path),
        n_heads=n_heads,
        n_kv_heads=settings.get("llama.attention.head_count_kv"),
        head_dim=head_dim,
        vocab_size=embedding.shape[0],
        ffn_hidden_dim=required(settings, "llama.feed_forward_length", path),
        norm_eps=required(settings, "llama.attention.layer_norm_rms_epsilon", path),
        tie_word_embeddings="output.weight" not in file.tensors,
        max_seq_len=required(settings, "llama.context_length", path),
        **rope_fields(settings, file.tensors.get(_ROPE_FACTORS), head_dim, path),
    )


def _tensor(file: GGUFFile, name: str, path: Path) -> StoredTensor:
    if name not in file.tensors:
        raise CheckpointError(f"{path} has no tensor {name}")
    return file.tensors[name]


def _head_dim(settings: dict[str, Any], path: Path, n_heads: int) -> int:
    head_dim = settings.get("llama.attention.key_length")
    if head_dim is None:
        head_dim = required(settings, "llama.embedding_length", path) // n_heads
    same = {"llama.attention.value_length": (head_dim,), "llama.rope.dimension_count": (head_dim,)}
    refuse(settings, same, path)
    return head_dim
