"""What both stages of training share: the optimizer, its learning rate, and the bar that shows progress."""

import math
from collections.abc import Iterable
from typing import Self

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

WEIGHT_DECAY = 0.05
LARGEST_NORM = 1.0
WARMUP = 50
PRINTED = 100
"""Where there is no terminal for a bar, a line is printed every so many steps."""


class Optimizer:
    """AdamW; the learning rate rises linearly, then falls as a cosine to a hundredth.

    slow: those of `parameters` that learn at a tenth of the rate.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        learning_rate: float,
        steps: int,
        slow: Iterable[nn.Parameter] = (),
    ) -> None:
        self._parameters, slow = list(parameters), set(slow)
        fast = [p for p in self._parameters if p not in slow]
        groups = [
            {"params": [p for p in fast if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in fast if p.dim() <= 1], "weight_decay": 0.0},
            {"params": list(slow), "weight_decay": WEIGHT_DECAY, "lr": learning_rate / 10},
        ]
        self._adamw = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._adamw, lambda step: _share(step, steps))

    def step(self, loss: Tensor) -> None:
        """Moves the parameters down the gradient of `loss`."""
        self._adamw.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, LARGEST_NORM)
        self._adamw.step()
        self._schedule.step()


def _share(step: int, steps: int) -> float:
    if step < WARMUP:
        return (step + 1) / WARMUP
    done = min((step - WARMUP) / max(steps - WARMUP, 1), 1.0)
    return 0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2


class ProgressBar:
    """Steps done, and running means of figures."""

    def __init__(self, title: str, steps: int, console: Console) -> None:
        self._title, self._console, self._done = title, console, 0
        self._means: dict[str, float] = {}
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console,
        )  # fmt: skip
        self._task = self._progress.add_task(title, total=steps, figures="")

    def __enter__(self) -> Self:
        self._progress.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.__exit__(*error)  # type: ignore[arg-type]

    def advance(self, **figures: Tensor) -> None:
        """One step done, which had these figures."""
        self._done += 1
        for name, value in figures.items():
            self._means[name] = 0.95 * self._means.get(name, value.item()) + 0.05 * value.item()
        shown = "  ".join(f"{name} {mean:.3f}" for name, mean in self._means.items())
        self._progress.update(self._task, advance=1, figures=shown)
        if not self._console.is_terminal and self._done % PRINTED == 0:
            self._console.print(f"{self._title}: step {self._done}  {shown}")
