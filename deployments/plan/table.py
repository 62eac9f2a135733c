"""The plan for people, as rich tables, and for machines, as JSON values."""

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from deployments.plan.fit import readable
from deployments.plan.needs import ExpertNeeds, RankNeeds
from deployments.plan.plan import ModelPlan


def show(plan: ModelPlan, console: Console) -> None:
    """Prints one model's plan."""
    console.print(f"[bold]{plan.id}[/bold]  {plan.dtype}, shapes from {plan.source}", highlight=False)
    if plan.needs is not None:
        needs = plan.needs
        console.print(f"{needs.parameters:,} parameters, {needs.weights:,} bytes ({readable(needs.weights)})")
        console.print(_table(plan))
        console.print(
            f"Keys and values: {needs.kv_per_token:,} bytes a token over all ranks; an engine replica holds "
            f"{_held(plan)} (max_model_len {needs.max_model_len:,})."
        )
        if plan.gpus:
            console.print(f"GPUs in all: {plan.gpus:g}.")
    for fault in plan.faults:
        console.print(f"[red]does not fit:[/red] {fault.what}.\n  Nearest remedy: {fault.remedy}.", highlight=False)


def _held(plan: ModelPlan) -> str:
    if plan.kv_tokens is None:
        return "not known: give kv_cache_memory or memory"
    return f"{plan.kv_tokens:,} tokens, or {plan.kv_sequences:,.1f} sequences of full length"


def _table(plan: ModelPlan) -> Table:
    assert plan.needs is not None
    table = Table()
    for title in ("who", "holds", "needs", "of", "left"):
        table.add_column(title, no_wrap=True, justify="left" if title in ("who", "holds") else "right")
    for rank in plan.needs.ranks:
        table.add_row(*_rank_row(rank, plan))
    if plan.needs.experts is not None:
        table.add_row(*_expert_row(plan.needs.experts, plan))
    return table


def _rank_row(rank: RankNeeds, plan: ModelPlan) -> list[str]:
    ranks = f"{plan.engines} x {plan.layout.tensor_parallel_size} ranks"
    who = ranks if plan.layout.pipeline_parallel_size == 1 else f"{ranks}, stage {rank.stage}"
    return [who, f"layers {rank.first_layer}-{rank.last_layer}", *_memory(rank.fixed, plan.memory.rank)]


def _expert_row(experts: ExpertNeeds, plan: ModelPlan) -> list[str]:
    holds = f"{experts.most} of {experts.copies} x {experts.layers * experts.per_layer} experts"
    return [f"{experts.servers} expert servers", holds, *_memory(experts.most_bytes, plan.memory.server)]


def _memory(used: int, memory: int | None) -> list[str]:
    return [readable(used), *(("?", "?") if memory is None else (readable(memory), readable(memory - used)))]


def as_json(plan: ModelPlan) -> dict[str, Any]:
    """Bytes everywhere; what is counted from the fields of the dataclasses is beside them."""
    values = asdict(plan) | {"fits": not plan.faults}
    if plan.needs is not None:
        values["needs"]["kv_per_token"] = plan.needs.kv_per_token
        if plan.needs.experts is not None:
            experts = plan.needs.experts
            counted = {"least": experts.least, "most": experts.most, "most_bytes": experts.most_bytes}
            values["needs"]["experts"] |= counted
    return values
