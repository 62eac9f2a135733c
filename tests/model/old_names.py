"""Rewrites a state dict of today, or a rank's slice of one, to each of its old namings."""

import io
import re
from collections.abc import Callable

import torch
from torch import Tensor

State = dict[str, Tensor]


def _renamed(pattern: str, new: str) -> Callable[[State], State]:
    return lambda state: {re.sub(pattern, new, name): tensor for name, tensor in state.items()}


def _joined(names: tuple[str, ...], fused: str) -> Callable[[State], State]:
    def join(state: State) -> State:
        out = {name: tensor for name, tensor in state.items() if not name.endswith(names)}
        for prefix in [name.removesuffix(names[0]) for name in state if name.endswith(names[0])]:
            out[prefix + fused] = torch.cat([state[prefix + name] for name in names])
        return out

    return join


def _flat_experts(state: State) -> State:
    old = {"w1": "moe_w_in_eD_F", "w2": "moe_w_out_eF_D", "w3": "moe_w_swiglu_eD_F"}
    return {
        re.sub(r"experts\.(w[123])$", lambda match: f"experts.{old[match[1]]}", name): (
            tensor.flatten(0, 1) if tensor.dim() == 3 else tensor
        )
        for name, tensor in state.items()
    }


def _with_leftovers(state: State) -> State:
    return state | {
        "rope.freqs": torch.ones(4),
        "layers.0.attention.wo._extra_state": io.BytesIO(b"x"),
        "layers.0.attention.wqkv._extra_state": torch.empty(0),
        "layers.1.feed_forward.experts.mlp._extra_state": io.BytesIO(),
        "layers.1.feed_forward.mlp_shared._extra_state": None,
        "layers.1.feed_forward.running_gate_stats_3E": torch.zeros(3, 4),
        "layers.1.feed_forward.global_gate_stats_3E": torch.zeros(3, 4),
        "layers.1.feed_forward.expert_activation_DE": torch.zeros(8, 4),
        "layers.0.attention.inner.core": torch.empty(0),
        "layers.0.bias": torch.empty(0),
        "empty": torch.empty(0),
    }


# The norm inside `mlp` belongs to dense layers, the one inside `norm` to layers of experts.
NAMINGS: dict[str, Callable[[State], State]] = {
    "fused wqkv": _joined(
        ("attention.wq.weight", "attention.wk.weight", "attention.wv.weight"), "attention.wqkv.weight"
    ),
    "fused mlp": lambda state: _renamed(r"(feed_forward)\.w2\.weight$", r"\1.mlp.fc2_weight")(
        _joined(("feed_forward.w1.weight", "feed_forward.w3.weight"), "feed_forward.mlp.fc1_weight")(state)
    ),
    "mlp.fc2_weight alone": _renamed(r"(feed_forward)\.w2\.weight$", r"\1.mlp.fc2_weight"),
    "flat experts": _flat_experts,
    "shared expert": lambda state: _renamed(r"shared_expert\.w1", "w_in_shared_FD")(
        _renamed(r"shared_expert\.w3", "w_swiglu_FD")(_renamed(r"shared_expert\.w2", "w_out_shared_DF")(state))
    ),
    "norm inside wqkv": _renamed(r"attention_norm\.weight", "attention.wqkv.layer_norm_weight"),
    "norm inside mlp": _renamed(r"(layers\.[02])\.ffn_norm\.weight", r"\1.feed_forward.mlp.layer_norm_weight"),
    "norm inside feed_forward": _renamed(r"(layers\.[13])\.ffn_norm\.weight", r"\1.feed_forward.norm.weight"),
    "leftovers": _with_leftovers,
}


_TOGETHER = [change for name, change in NAMINGS.items() if name != "mlp.fc2_weight alone"]


def all_at_once(state: State) -> State:
    for change in _TOGETHER:
        state = change(state)
    return state


NAMINGS["all at once"] = all_at_once
