"""Mixture of experts: a router, the experts it chooses from, and the seam between the two.

`MoE` decides which tokens go to which experts and adds up what comes back; an `Experts` does
the work, in this process (`LocalExperts`) or elsewhere. Shapes are in the names, after Meta:
a tokens, k routed (token, expert) pairs, E experts, D model width, F hidden width.
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.mappings import copy_to_model_parallel_region, reduce_from_model_parallel_region
from torch import Tensor, nn

from model import load_hooks
from model.args import ModelArgs, MoEArgs
from model.layers import FeedForward
from model.parallel import model_parallel_rank, model_parallel_size, split


class PendingExperts(Protocol):
    """Expert outputs under way."""

    def wait(self, give_up: float | None = None) -> Tensor:
        """[k, D], the rows in the order they were submitted. give_up: seconds to wait for, if not as long as usual."""


class Experts(Protocol):
    """Whoever computes routed tokens of one layer.

    is_whole: whether outputs are whole, or this tensor-parallel rank's part, to be summed over ranks.
    """

    is_whole: bool

    def submit(self, x_kD: Tensor, experts_k: Tensor, routed_k: Tensor | None = None) -> PendingExperts:
        """Starts expert `experts_k[i]` on row i. x_kD: [k, D]; experts_k: int64 [k].

        routed_k: experts of all pairs of the step, where other ranks submit the rest, those of an expert together;
        None: these are all.
        """


class Ready:
    """Outputs that are there already."""

    def __init__(self, out_kD: Tensor) -> None:
        self._out_kD = out_kD

    def wait(self, give_up: float | None = None) -> Tensor:
        return self._out_kD


class LocalExperts(nn.Module):
    """Every expert's SwiGLU in this process; the hidden width is split over tensor-parallel ranks.

    Each expert computes its own tokens only: rows are sorted by expert and cut where it changes.
    """

    is_whole = False

    def __init__(self, num_experts: int, dim: int, hidden_dim: int) -> None:
        super().__init__()
        hidden = split(hidden_dim, "expert hidden_dim")
        self.w1 = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.w2 = nn.Parameter(torch.empty(num_experts, hidden, dim))
        self.w3 = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.register_load_state_dict_pre_hook(load_hooks.StackExperts(num_experts))

    def submit(self, x_kD: Tensor, experts_k: Tensor, routed_k: Tensor | None = None) -> Ready:
        return Ready(compute_by_expert(x_kD, experts_k, self.w1.shape[0], self.compute))

    def compute(self, x: Tensor, counts: list[int]) -> Tensor:
        """`counts[e]` rows for each expert e in turn -> this rank's part of their outputs, like x: [rows, D]."""
        parts = enumerate(x.split(counts))
        outputs = [(F.silu(rows @ self.w1[e]) * (rows @ self.w3[e])) @ self.w2[e] for e, rows in parts if len(rows)]
        return torch.cat(outputs) if outputs else x


class MoE(nn.Module):
    """The routed feed-forward of a block.

    Llama 4 ("sigmoid"): an expert's input is scaled by the sigmoid of its score, outputs are
    added to the shared expert's. Mixtral ("softmax"): a token's outputs are averaged with the
    softmax over the scores of its experts.

    experts: who computes routed tokens, if not weights of this module.
    """

    def __init__(self, args: ModelArgs, experts: Experts | None = None) -> None:
        super().__init__()
        if args.moe_args is None:
            raise ValueError("moe_args is needed for a layer with experts")
        self.args = args.moe_args
        hidden = args.expert_hidden_dim
        self.router_DE = nn.Parameter(torch.empty(args.dim, self.args.num_experts))
        self.experts = LocalExperts(self.args.num_experts, args.dim, hidden) if experts is None else experts
        self.shared_expert = FeedForward(args.dim, hidden) if self.args.shared_expert else None
        self.register_load_state_dict_pre_hook(load_hooks.Rename(load_hooks.MOE_NAMES))

    def forward(self, x: Tensor) -> Tensor:
        x_aD = copy_to_model_parallel_region(x.flatten(0, -2))
        experts, weights = route(x_aD @ self.router_DE, self.args)
        routed = dispatch(x_aD, experts, weights, self.experts, None, self.args)
        routed = reduce_from_model_parallel_region(routed).view_as(x)
        return routed if self.shared_expert is None else routed + self.shared_expert(x)


def route(scores_aE: Tensor, args: MoEArgs) -> tuple[Tensor, Tensor]:
    """The experts of every token and their weights: int64 [a, top_k], scores' dtype [a, top_k]."""
    scores, experts = scores_aE.topk(args.top_k, dim=-1)
    if args.router == "sigmoid":
        return experts, scores.sigmoid()
    return experts, scores.softmax(-1, dtype=torch.float32).type_as(scores)


def dispatch(
    x_aD: Tensor,
    experts: Tensor,
    weights: Tensor,
    computed_by: Experts,
    shared_expert: Callable[[Tensor], Tensor] | None,
    args: MoEArgs,
) -> Tensor:
    """Sends every token to its experts, and to the shared one while those are away; adds up what returns: [a, D].

    Experts whose outputs are whole get each pair from one tensor-parallel rank only; the sum over ranks that follows
    is the same. The expert says which rank: the token's place in the batch would make bits depend on its company.
    """
    experts_k, weights_k1, routed_k = experts.flatten(), weights.reshape(-1, 1), None
    tokens_k = None if args.top_k == 1 else _tokens_of_pairs(x_aD, args.top_k)  # None: pair i is of token i
    if computed_by.is_whole and (size := model_parallel_size()) > 1:
        routed_k = experts_k
        own = experts_k % size == model_parallel_rank()
        tokens_k, experts_k, weights_k1 = _tokens_of_pairs(x_aD, args.top_k)[own], experts_k[own], weights_k1[own]
    in_kD = x_aD if tokens_k is None else x_aD[tokens_k]
    scale_input = args.router == "sigmoid"
    pending = computed_by.submit(in_kD * weights_k1 if scale_input else in_kD, experts_k, routed_k)
    out_aD = torch.zeros_like(x_aD) if shared_expert is None else shared_expert(x_aD)
    out_kD = pending.wait() if scale_input else pending.wait() * weights_k1
    return out_aD + out_kD if tokens_k is None else out_aD.index_add(0, tokens_k, out_kD)


def _tokens_of_pairs(x_aD: Tensor, top_k: int) -> Tensor:
    """int64 [a * top_k]"""
    return torch.arange(x_aD.shape[0], device=x_aD.device).repeat_interleave(top_k)


def compute_by_expert(
    x_kD: Tensor,
    experts_k: Tensor,
    num_experts: int,
    compute: Callable[[Tensor, list[int]], Tensor],
) -> Tensor:
    """`compute(rows sorted by expert, how many of each)`; what it gives returns in the order the rows came: [k, D]."""
    order = experts_k.argsort(stable=True)
    counts = torch.bincount(experts_k, minlength=num_experts).tolist()
    return torch.empty_like(x_kD).index_copy(0, order, compute(x_kD[order], counts))
