"""Old names of weights: state-dict hooks that give each the name, and the shape, it has today.

A hook renames what it knows before its module is filled, and leaves a name alone when today's is
there as well, so that `load_state_dict` reports it. It sees what one tensor-parallel rank holds.
Sources of the names: Llama 4 as published, and https://github.com/meta-llama/llama-models (llama4/).
"""

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

State = MutableMapping[str, Any]

FUSED_QKV = "wqkv.weight"
FUSED_W1_W3 = "mlp.fc1_weight"
BLOCK_NAMES = {
    "attention.wqkv.layer_norm_weight": "attention_norm.weight",
    "feed_forward.mlp.layer_norm_weight": "ffn_norm.weight",
    "feed_forward.norm.weight": "ffn_norm.weight",
}
FEED_FORWARD_NAMES = {"mlp.fc2_weight": "w2.weight"}
MOE_NAMES = {
    "w_in_shared_FD.weight": "shared_expert.w1.weight",
    "w_out_shared_DF.weight": "shared_expert.w2.weight",
    "w_swiglu_FD.weight": "shared_expert.w3.weight",
}
EXPERTS_NAMES = {"moe_w_in_eD_F": "w1", "moe_w_out_eF_D": "w2", "moe_w_swiglu_eD_F": "w3"}

_LEFTOVERS = ("rope.freqs", "_extra_state", "running_gate_stats_3E", "global_gate_stats_3E", "expert_activation_DE")


def is_leftover(name: str) -> bool:
    """Whether `name` is state of training or of another implementation, nothing that a model computes with."""
    return name.endswith(_LEFTOVERS)


def drop_leftovers(module: nn.Module, state: State, prefix: str, *_: Any) -> None:
    """Forgets leftovers, and empty vectors that are no parameter of `module`, a block or a whole model."""
    own = module.state_dict().keys()
    for name in [name for name in state if name.startswith(prefix) and name.removeprefix(prefix) not in own]:
        value = state[name]
        is_empty = isinstance(value, Tensor) and value.shape == (0,)
        if is_empty or is_leftover(name):
            del state[name]


@dataclass(frozen=True)
class Rename:
    """names: old -> new, below the module."""

    names: Mapping[str, str]

    def __call__(self, _module: nn.Module, state: State, prefix: str, *_: Any) -> None:
        for old, new in self.names.items():
            if prefix + old in state and prefix + new not in state:
                state[prefix + new] = state.pop(prefix + old)


@dataclass(frozen=True)
class SplitRows:
    """Takes a matrix apart that holds several, one above the other. parts: name -> its share of the rows."""

    fused: str
    parts: Mapping[str, int]

    def __call__(self, _module: nn.Module, state: State, prefix: str, *_: Any) -> None:
        if prefix + self.fused not in state or any(prefix + name in state for name in self.parts):
            return
        whole: Tensor = state.pop(prefix + self.fused)
        unit = _divided(whole, sum(self.parts.values()), prefix + self.fused)
        rows = torch.split(whole, [unit * share for share in self.parts.values()])
        state.update(zip((prefix + name for name in self.parts), rows, strict=True))


@dataclass(frozen=True)
class StackExperts:
    """Experts whose matrices lie one above the other become a stack of them."""

    num_experts: int

    def __call__(self, _module: nn.Module, state: State, prefix: str, *_: Any) -> None:
        for old, new in EXPERTS_NAMES.items():
            if prefix + old in state and prefix + new not in state:
                flat: Tensor = state.pop(prefix + old)
                rows = _divided(flat, self.num_experts, prefix + old)
                state[prefix + new] = flat.reshape(self.num_experts, rows, -1)


def _divided(matrix: Tensor, parts: int, name: str) -> int:
    rows, rest = divmod(matrix.shape[0], parts)
    if rest:
        raise ValueError(f"{name} has {matrix.shape[0]} rows, which do not cut into {parts} equal parts")
    return rows
