"""From logits to tokens: which token follows each row, and how likely it was.

A row's result depends on nothing but that row, so a request reads the same alone and in any
batch. Work is done only for rows that need it: a batch of greedy rows costs one argmax, plain
temperature one softmax, and top-k, top-p and min-p sort only tokens that can matter.
Semantics follow vLLM: log probabilities are those of the model itself, before temperature,
penalties and biases.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.counter_random import uniform
from model.penalties import Adjustment

SEGMENT = 128
"""Vocabulary entries whose sum or maximum stands for them in the first of two looks."""

LOGPROB_ROWS = 64
"""Rows whose log probabilities are computed at once, to bound memory."""


@dataclass(frozen=True)
class RandomRows:
    """The rows that are sampled by chance; one entry of each array for each.

    rows: int64, index of the logit row. temperature: float32, positive. top_k: int64, 0 keeps all.
    top_p, min_p: float64, 1 and 0 keep all. seed, choice, position: uint64, arguments of the random number.
    """

    rows: NDArray[np.int64]
    temperature: NDArray[np.float32]
    top_k: NDArray[np.int64]
    top_p: NDArray[np.float64]
    min_p: NDArray[np.float64]
    seed: NDArray[np.uint64]
    choice: NDArray[np.uint64]
    position: NDArray[np.uint64]


@dataclass(frozen=True)
class SamplingBatch:
    """What to do with the logit rows of a step.

    A token is chosen for each of the first `num_samples` rows: the likeliest, unless `random`
    names the row. The rows after them ask how likely `targets` (one for each) are.
    num_top, targets_top: for each row, how many alternatives to report; -1 reports nothing at all.
    None for `num_top` reports nothing for any row.
    """

    num_samples: int
    random: RandomRows | None = None
    adjustments: tuple[Adjustment, ...] = ()
    num_top: tuple[int, ...] | None = None
    targets: tuple[int, ...] = ()
    targets_top: tuple[int, ...] = ()


@dataclass(frozen=True)
class RowLogprobs:
    """A token, its natural log probability, its rank (1 is the likeliest), and the likeliest tokens in order."""

    token: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class SampledTokens:
    """tokens: one for each sampled row. logprobs: for each sampled row that asked. targets: for each target row."""

    tokens: list[int]
    logprobs: list[RowLogprobs | None] | None = None
    targets: list[RowLogprobs] = field(default_factory=list)


def sample(logits: Tensor, batch: SamplingBatch) -> SampledTokens:
    """Chooses from `logits` [num_rows, vocab_size] (float32 or bfloat16; not changed)."""
    rows = logits.detach().float().cpu().numpy()
    chosen = _choose(rows[: batch.num_samples], batch)
    logprobs = None
    if batch.num_top is not None:
        wanted = [row for row, top in enumerate(batch.num_top) if top >= 0]
        tops = [batch.num_top[row] for row in wanted]
        found = _logprobs(rows, wanted, [chosen[row] for row in wanted], tops)
        by_row = dict(zip(wanted, found, strict=True))
        logprobs = [by_row.get(row) for row in range(batch.num_samples)]
    target_rows = list(range(batch.num_samples, batch.num_samples + len(batch.targets)))
    return SampledTokens(chosen, logprobs, _logprobs(rows, target_rows, batch.targets, batch.targets_top))


def _choose(rows: NDArray[np.float32], batch: SamplingBatch) -> list[int]:
    if batch.adjustments:
        rows = rows.copy()
        for adjustment in batch.adjustments:
            adjustment.apply(rows[adjustment.row])
    if batch.random is None:
        return rows.argmax(axis=1).tolist()
    chosen = np.empty(len(rows), np.int64)
    if len(batch.random.rows) < len(rows):
        greedy = np.setdiff1d(np.arange(len(rows)), batch.random.rows)
        chosen[greedy] = rows[greedy].argmax(axis=1)
    chosen[batch.random.rows] = _draw(rows, batch.random)
    return chosen.tolist()


def _draw(logits: NDArray[np.float32], random: RandomRows) -> list[int]:
    numbers = uniform(random.seed, random.choice, random.position)
    filtered = (random.top_k > 0) | (random.top_p < 1) | (random.min_p > 0)
    # One row at a time, in memory that stays in the CPU's cache.
    weights = np.empty(logits.shape[1], np.float32)
    chosen = []
    for place, (row, number) in enumerate(zip(random.rows, numbers, strict=True)):
        _weigh(logits[row], random.temperature[place], weights)
        if filtered[place]:
            likely = _likely(weights, int(random.top_k[place]), random.top_p[place], random.min_p[place])
            chosen.append(int(likely[_invert(weights[likely], number)]))
        else:
            chosen.append(_invert_long(weights, number))
    return chosen


def _weigh(logits: NDArray[np.float32], temperature: np.float32, weights: NDArray[np.float32]) -> None:
    """Probabilities up to a factor, the largest 1, into `weights`."""
    np.subtract(logits, logits.max(), out=weights)
    np.divide(weights, temperature, out=weights)
    np.exp(weights, out=weights)


def _invert(weights: NDArray[np.float32], number: float) -> int:
    """The index where the cumulated `weights` first exceed the share `number` of their sum."""
    cumulated = np.cumsum(weights, dtype=np.float64)
    # Rounding must not reach past the last weight above zero.
    target = min(number * cumulated[-1], np.nextafter(cumulated[-1], 0))
    return min(int(np.searchsorted(cumulated, target, side="right")), len(weights) - 1)


def _invert_long(weights: NDArray[np.float32], number: float) -> int:
    """`_invert` for a whole vocabulary: finds the segment first, then the place in it."""
    sums = np.add.reduceat(weights, _segments(len(weights)))
    cumulated = np.cumsum(sums, dtype=np.float64)
    segment = _invert(sums, number)
    before = cumulated[segment - 1] if segment else 0.0
    within = (number * cumulated[-1] - before) / max(float(sums[segment]), np.finfo(np.float32).tiny)
    start = segment * SEGMENT
    return start + _invert(weights[start : start + SEGMENT], min(max(within, 0.0), 1.0))


def _likely(weights: NDArray[np.float32], top_k: int, top_p: float, min_p: float) -> NDArray[np.int64]:
    """Tokens that pass all filters, the likeliest first; equal ones by id.

    As in vLLM: min-p first, then top-k, then top-p over what is left; at least one token passes.
    weights: as from `_weigh`.
    """
    bound = min_p  # the largest weight is 1
    if 0 < top_k < len(weights):
        tokens = _descending(weights, max(bound, _kth_bound(weights, top_k)))[:top_k]
        total = float(weights[tokens].sum(dtype=np.float64))
    else:
        total = float(weights[weights >= bound].sum(dtype=np.float64))
        tokens = _descending(weights, max(bound, _mass_bound(weights, top_p * total)))
    if top_p >= 1:
        return tokens
    cumulated = np.cumsum(weights[tokens], dtype=np.float64)
    return tokens[: int(np.searchsorted(cumulated, top_p * total, side="left")) + 1]


def _mass_bound(weights: NDArray[np.float32], mass: float) -> float:
    """A value such that the `weights` not below it have at least `mass` together, few of them if it can be."""
    bound = 0.1
    while bound > 1e-9:
        if float(weights[weights >= bound].sum(dtype=np.float64)) > mass:
            return bound
        bound *= 0.1
    return 0.0


def _kth_bound(values: NDArray[np.float32], k: int) -> float:
    """A value that at least `k` of `values` reach, near the k-th largest."""
    maxima = np.maximum.reduceat(values, _segments(len(values)))
    if k > len(maxima):
        return float(np.partition(values, -k)[-k])
    return float(np.partition(maxima, -k)[-k])


def _descending(values: NDArray[np.float32], bound: float) -> NDArray[np.int64]:
    """Indices of the `values` not below `bound`, the largest first, equal ones by index."""
    indices = np.flatnonzero(values >= bound)
    return indices[np.argsort(-values[indices], kind="stable")]


def _segments(length: int) -> NDArray[np.int64]:
    return np.arange(0, length, SEGMENT)


def _logprobs(
    logits: NDArray[np.float32], rows: list[int], tokens: tuple[int, ...] | list[int], tops: tuple[int, ...] | list[int]
) -> list[RowLogprobs]:
    """How likely `tokens` are in `rows` of `logits`, and the `tops` likeliest tokens of each."""
    found = []
    for first in range(0, len(rows), LOGPROB_ROWS):
        part = slice(first, first + LOGPROB_ROWS)
        values = torch.log_softmax(torch.from_numpy(logits[rows[part]]), dim=-1).numpy()
        found += [_row(*entry) for entry in zip(values, tokens[part], tops[part], strict=True)]
    return found


def _row(values: NDArray[np.float32], token: int, num_top: int) -> RowLogprobs:
    top: list[tuple[int, float]] = []
    if num_top > 0:
        num_top = min(num_top, len(values))
        likeliest = _descending(values, _kth_bound(values, num_top))[:num_top]
        top = list(zip(likeliest.tolist(), values[likeliest].tolist(), strict=True))
    return RowLogprobs(token, float(values[token]), int(np.count_nonzero(values > values[token])) + 1, top)
