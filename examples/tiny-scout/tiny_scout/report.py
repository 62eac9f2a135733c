"""The table of results on held-out digits, of a checkpoint as it is and with its experts taken away."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from model import LLM
from tiny_scout import digits
from tiny_scout.answering import load
from tiny_scout.experts import (
    expert_use,
    freeze_router,
    shuffle_experts,
    silence_experts,
    silence_shared_experts,
)
from tiny_scout.held_out import accuracy, comparisons, singles, sums

NUM_DIGITS_ABLATED = 120
ABLATIONS: dict[str, Callable[[LLM], None]] = {
    **{f"experts moved on by {n}": partial(shuffle_experts, places=n) for n in range(1, 8)},
    **{f"router frozen at expert {n}": partial(freeze_router, expert=n) for n in range(8)},
    "no routed experts": silence_experts,
    "no shared experts": silence_shared_experts,
}


def print_report(folder: Path, console: Console) -> None:
    """Loads the checkpoint as it is served, in float32, and answers every exam."""
    exams = {"one digit": singles, "sum of two": sums, "larger of two": comparisons}
    table = Table(title="Answered word for word, held-out digits")
    for heading in ("model", "digits", *exams):
        table.add_column(heading)
    for name, ablate in {"whole": None, **ABLATIONS}.items():
        model, chat = load(folder)
        asked = digits.HELD_OUT if ablate is None else digits.HELD_OUT[:NUM_DIGITS_ABLATED]
        if ablate is not None:
            ablate(model)
        shares = [accuracy(model, chat, exam(asked)) for exam in exams.values()]
        table.add_row(name, str(len(asked)), *(f"{share:.1%}" for share in shares))
    console.print(table)
    console.print(_use_table(folder))


def _use_table(folder: Path) -> Table:
    model, chat = load(folder)
    with expert_use(model) as counts:
        accuracy(model, chat, sums(digits.HELD_OUT[:NUM_DIGITS_ABLATED]))
    table = Table("layer", *(f"expert {i}" for i in range(counts.shape[1])), title="Share of tokens (two-image sums)")
    for layer, row in enumerate(counts / counts.sum(dim=1, keepdim=True)):
        table.add_row(str(layer), *(f"{share:.0%}" for share in row.tolist()))
    return table
