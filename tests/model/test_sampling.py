"""Each choice against a slow, obvious form of itself, and rows against the batch they are in."""

import math

import numpy as np
import pytest
import torch

from model.counter_random import philox, uniform
from model.penalties import Adjustment, SeenTokens
from model.sampling import RandomRows, SamplingBatch, sample

VOCAB = 1000
PARAMS = [
    {},
    {"temperature": 0.3},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 50, "top_p": 0.7},
    {"top_k": 5000, "top_p": 0.7},
    {"top_p": 0.9},
    {"top_p": 0.0},
    {"top_p": 0.999, "min_p": 0.02},
    {"min_p": 0.1},
    {"temperature": 2.0, "top_k": 300, "min_p": 0.001},
]


def logits(rows: int, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def random_rows(params: list[dict], *, rows: list[int] | None = None, position: int = 0) -> RandomRows:
    def column(name: str, default: float, dtype: type) -> np.ndarray:
        return np.array([one.get(name, default) for one in params], dtype)

    return RandomRows(
        rows=np.array(range(len(params)) if rows is None else rows),
        temperature=column("temperature", 1.0, np.float32),
        top_k=column("top_k", 0, np.int64),
        top_p=column("top_p", 1.0, np.float64),
        min_p=column("min_p", 0.0, np.float64),
        seed=column("seed", 7, np.uint64),
        choice=column("choice", 0, np.uint64),
        position=column("position", position, np.uint64),
    )


def allowed(row: torch.Tensor, params: dict) -> set[int]:
    """The tokens that pass the filters, by the book: sort everything."""
    probs = torch.softmax(row.double() / params.get("temperature", 1.0), -1)
    order = torch.sort(probs, descending=True, stable=True).indices
    order = order[probs[order] >= params.get("min_p", 0.0) * probs.max()][: params.get("top_k") or None]
    mass_before = probs[order].cumsum(0) - probs[order]
    kept = mass_before < params.get("top_p", 1.0) * probs[order].sum()
    return {int(order[0]), *order[kept].tolist()}


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0, 0, 0, 0], [0, 0], "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_words(counter: list[int], key: list[int], words: str) -> None:
    out = philox(np.array([counter] * 2, np.uint64).T, np.array([key] * 2, np.uint64).T)
    for column in out.T:
        assert " ".join(f"{word:08x}" for word in column) == words


def test_uniform_depends_on_seed_choice_and_position_and_is_uniform() -> None:
    n = 20000
    zero, count = np.zeros(n, np.uint64), np.arange(n, dtype=np.uint64)
    draws = [uniform(count, zero, zero), uniform(zero, count, zero), uniform(zero, zero, count)]
    for draw in draws:
        assert draw.min() >= 0
        assert draw.max() < 1
        assert len(np.unique(draw)) == n
        assert np.histogram(draw, 10, (0, 1))[0] == pytest.approx(n / 10, abs=200)
    assert abs(np.corrcoef(draws)[0, 1]) < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_is_the_first_of_the_largest(dtype: torch.dtype) -> None:
    x = logits(32, 5000).to(dtype)
    x[3, 40] = x[3, 70] = 100
    expected = [int(np.flatnonzero(row == row.max())[0]) for row in x.float().numpy()]
    assert sample(x, SamplingBatch(32)).tokens == expected
    assert expected[3] == 40


@pytest.mark.parametrize("params", PARAMS)
def test_only_tokens_that_pass_the_filters_are_drawn_and_all_that_pass_can_be(params: dict) -> None:
    row = logits(1, 60)
    n = 4000
    drawn = sample(
        row.expand(n, -1), SamplingBatch(n, random_rows([{**params, "position": p} for p in range(n)]))
    ).tokens
    passing = allowed(row[0], params)
    assert set(drawn) <= passing
    probs = torch.softmax(row[0].double() / params.get("temperature", 1.0), -1)
    total = sum(float(probs[t]) for t in passing)
    for token in passing:
        expected = float(probs[token]) / total
        assert drawn.count(token) / n == pytest.approx(expected, abs=5 * math.sqrt(expected / n) + 1e-3)


@pytest.mark.parametrize("params", PARAMS)
def test_filters_agree_with_a_full_sort_on_a_large_vocabulary(params: dict) -> None:
    x = logits(40, 49152)
    drawn = sample(x, SamplingBatch(40, random_rows([{**params, "position": p} for p in range(40)]))).tokens
    for row, token in zip(x, drawn, strict=True):
        assert token in allowed(row, params)


def test_a_row_gives_the_same_alone_and_in_any_batch() -> None:
    x = logits(33, 49152)
    params = [{**PARAMS[i % len(PARAMS)], "position": i} for i in range(33)]
    together = sample(x, SamplingBatch(33, random_rows(params), num_top=(3,) * 33))
    for i in range(33):
        alone = sample(x[i : i + 1], SamplingBatch(1, random_rows([params[i]]), num_top=(3,)))
        assert alone.tokens == [together.tokens[i]]
        assert alone.logprobs == [together.logprobs[i]]


def test_greedy_and_random_rows_mix() -> None:
    x = logits(3)
    tokens = sample(x, SamplingBatch(3, random_rows([{"temperature": 5.0}], rows=[1]))).tokens
    assert [tokens[0], tokens[2]] == x[[0, 2]].argmax(-1).tolist()
    assert tokens[1] == sample(x[1:2], SamplingBatch(1, random_rows([{"temperature": 5.0}]))).tokens[0]


def test_a_tiny_temperature_is_stable() -> None:
    x = logits(2)
    tokens = sample(x, SamplingBatch(2, random_rows([{"temperature": 1e-4}] * 2))).tokens
    assert tokens == x.argmax(-1).tolist()


def test_penalties_follow_vllm() -> None:
    x = torch.tensor([[2.0, -2.0, 1.0, 0.5]])
    seen = SeenTokens([0, 1, 0], [2])
    seen.add(2)
    row = x[0].numpy().copy()
    Adjustment(0, seen=seen, presence=0.1, frequency=0.2, repetition=2.0).apply(row)
    # Prompt tokens are repetition-penalized only; output tokens get all three.
    assert row == pytest.approx([1.0, -4.0, 0.5 - 0.1 - 2 * 0.2, 0.5])


def test_seen_tokens_grow_and_count() -> None:
    seen = SeenTokens(range(5))
    for token in [7, 3, 7, *range(100, 200)]:
        seen.add(token)
    counts = dict(zip(seen.tokens.tolist(), seen.counts.tolist(), strict=True))
    assert counts == {0: 0, 1: 0, 2: 0, 3: 1, 4: 0, 7: 2} | dict.fromkeys(range(100, 200), 1)


def test_bias_and_bans_decide_and_leave_the_logits_and_their_logprobs_alone() -> None:
    x = logits(2)
    before = x.clone()
    best = int(x[1].argmax())
    batch = SamplingBatch(
        2, adjustments=(Adjustment(0, bias={17: 100.0}), Adjustment(1, banned=(best,))), num_top=(0, 1)
    )
    result = sample(x, batch)
    assert result.tokens[0] == 17
    assert result.tokens[1] == int(x[1].topk(2).indices[1])
    assert torch.equal(x, before)
    raw = torch.log_softmax(before, -1)
    assert result.logprobs[0].logprob == pytest.approx(float(raw[0, 17]), abs=1e-5)
    assert result.logprobs[0].top == []
    assert result.logprobs[1].rank == 2
    assert result.logprobs[1].top[0][0] == best


def test_logprobs_of_targets_and_of_rows_that_ask() -> None:
    x = logits(4 + 100)
    targets = tuple(range(100))
    result = sample(x, SamplingBatch(4, num_top=(-1, 20, -1, 0), targets=targets, targets_top=(2,) * 100))
    assert [row is None for row in result.logprobs] == [True, False, True, False]
    raw = torch.log_softmax(x, -1)
    top = raw[1].topk(20)
    assert [token for token, _ in result.logprobs[1].top] == top.indices.tolist()
    assert [value for _, value in result.logprobs[1].top] == pytest.approx(top.values.tolist(), abs=1e-5)
    for row, (target, found) in enumerate(zip(targets, result.targets, strict=True), start=4):
        assert found.token == target
        assert found.logprob == pytest.approx(float(raw[row, target]), abs=1e-5)
        assert found.rank == int((raw[row] > raw[row, target]).sum()) + 1
        assert len(found.top) == 2


def test_no_sampled_rows() -> None:
    result = sample(logits(2), SamplingBatch(0, targets=(1, 2), targets_top=(0, 0)))
    assert result.tokens == []
    assert len(result.targets) == 2
    assert sample(logits(0), SamplingBatch(0)).tokens == []
