"""Keeping experts busy in training, and taking them away to see what they were worth."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from model import LLM
from model.moe import LocalExperts, MoE


def moe_layers(model: LLM) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)]


@torch.no_grad()
def initialize_experts(model: LLM) -> None:
    """Draws routed experts anew with deviation 1 / sqrt(inputs), so that what they add matters from the start.

    `LLM` starts them 4 to 14 times smaller. Then attention learns to carry a digit to its answer past all experts,
    and single digits are read whichever expert a token meets.
    """
    for moe in moe_layers(model):
        for weight in moe.experts.parameters():
            weight.normal_(std=weight.shape[1] ** -0.5)


@contextmanager
def router_scores(model: LLM) -> Iterator[list[Tensor]]:
    """Collects the router scores [tokens, experts] of each layer with experts, in order, of the forward pass inside."""
    scores: list[Tensor] = []

    def collect(moe: nn.Module, inputs: tuple[Tensor]) -> None:
        assert isinstance(moe, MoE)
        scores.append(inputs[0].flatten(0, -2) @ moe.router_DE)

    hooks = [moe.register_forward_pre_hook(collect) for moe in moe_layers(model)]
    try:
        yield scores
    finally:
        for hook in hooks:
            hook.remove()


def imbalance(scores: Tensor) -> Tensor:
    """Switch Transformer's load-balancing loss (Fedus et al., 2021): 1 when all experts get as many tokens.

    scores: [tokens, experts]. Its gradient lowers the scores of experts that get too many.
    """
    scores = scores.float()
    num_experts = scores.shape[1]
    shares = torch.bincount(scores.argmax(dim=1), minlength=num_experts) / len(scores)
    return num_experts * shares @ scores.softmax(dim=1).mean(dim=0)


@contextmanager
def expert_use(model: LLM) -> Iterator[Tensor]:
    """Counts, int64 [layers with experts, experts], of the tokens that each expert gets in all passes inside."""
    moes = moe_layers(model)
    counts = torch.zeros(len(moes), moes[0].args.num_experts, dtype=torch.int64)

    def count(row: Tensor) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def add(moe: nn.Module, inputs: tuple[Tensor]) -> None:
            assert isinstance(moe, MoE)
            experts = (inputs[0].flatten(0, -2) @ moe.router_DE).argmax(dim=-1)
            row.add_(torch.bincount(experts, minlength=len(row)))

        return add

    hooks = [moe.register_forward_pre_hook(count(row)) for moe, row in zip(moes, counts, strict=True)]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def shuffle_experts(model: LLM, places: int = 1) -> None:
    """Every expert of each layer moves so many places on: routers now choose the wrong one."""
    for moe in moe_layers(model):
        for weight in moe.experts.parameters():
            weight.copy_(weight.roll(places, dims=0))


@torch.no_grad()
def freeze_router(model: LLM, expert: int) -> None:
    """Every token of each layer goes to `expert`, scaled by that expert's own score."""
    for moe in moe_layers(model):
        moe.router_DE.copy_(moe.router_DE[:, expert : expert + 1].expand_as(moe.router_DE))
        for weight in moe.experts.parameters():
            weight.copy_(weight[expert].expand_as(weight))


@torch.no_grad()
def silence_experts(model: LLM) -> None:
    """Routed experts add nothing: attention and shared experts are left."""
    for moe in moe_layers(model):
        assert isinstance(moe.experts, LocalExperts)
        moe.experts.w2.zero_()


@torch.no_grad()
def silence_shared_experts(model: LLM) -> None:
    """Shared experts add nothing."""
    for moe in moe_layers(model):
        assert moe.shared_expert is not None
        moe.shared_expert.w2.weight.zero_()
