"""Today's names for what Meta's files call otherwise, one file at a time: fused tensors are a rank's own join.

The same namings as in model.load_hooks, on tensors that are still on disk.
"""

import re
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

from model import load_hooks
from model.checkpoint.source import Part, Stacked, TensorSource

_LAYER = re.compile(r"(layers\.\d+\.)(.+)")
_EXPERTS = "feed_forward.experts."


def _below(prefix: str, names: Mapping[str, str]) -> dict[str, str]:
    return {prefix + old: prefix + new for old, new in names.items()}


_RENAMED = (
    load_hooks.BLOCK_NAMES
    | _below("feed_forward.", load_hooks.FEED_FORWARD_NAMES)
    | _below("feed_forward.", load_hooks.MOE_NAMES)
)
_STACKED = _below(_EXPERTS, load_hooks.EXPERTS_NAMES)
_QKV = "attention." + load_hooks.FUSED_QKV
_W1_W3 = "feed_forward." + load_hooks.FUSED_W1_W3


def current(stored: Mapping[str, TensorSource], params: Mapping[str, Any]) -> dict[str, TensorSource]:
    """One file's tensors under today's names. A name that is there twice, or does not cut, stays as it is."""
    sources: dict[str, TensorSource] = {}
    for name, source in stored.items():
        layer = _LAYER.fullmatch(name)
        parts = _parts(layer[1], layer[2], source, params) if layer else {}
        sources |= {name: source} if not parts or any(part in stored for part in parts) else parts
    return sources


def _parts(layer: str, name: str, source: TensorSource, params: Mapping[str, Any]) -> dict[str, TensorSource]:
    """What an old name holds; nothing when it is not one."""
    if name in _RENAMED:
        return {layer + _RENAMED[name]: source}
    if name in _STACKED:
        num_experts = (params.get("moe_args") or {}).get("num_experts", 0)
        experts = _rows(source, [1] * num_experts)
        return {layer + _STACKED[name]: Stacked(tuple(experts))} if experts else {}
    shares = _shares(name, params)
    rows = _rows(source, list(shares.values()))
    return dict(zip((layer + part for part in shares), rows, strict=True)) if rows else {}


def _shares(name: str, params: Mapping[str, Any]) -> dict[str, int]:
    """What a fused name joins, and in which proportion; nothing when it is none."""
    if name == _QKV:
        kv_heads = params.get("n_kv_heads") or params["n_heads"]
        return {
            "attention.wq.weight": params["n_heads"],
            "attention.wk.weight": kv_heads,
            "attention.wv.weight": kv_heads,
        }
    return {"feed_forward.w1.weight": 1, "feed_forward.w3.weight": 1} if name == _W1_W3 else {}


def _rows(source: TensorSource, shares: list[int]) -> list[TensorSource]:
    """Cuts the rows of `source` in proportion to `shares`; nothing when they do not divide."""
    total = sum(shares)
    if total == 0 or source.shape[0] % total:
        return []
    unit = source.shape[0] // total
    ends = list(accumulate(unit * share for share in shares))
    return [Part(source, 0, end - unit * share, end) for share, end in zip(shares, ends, strict=True)]
