"""The scheduler driven by a fake model, without threads: what always holds, and each rule alone."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.engine.postprocess import postprocess
from deployments.engine.request import EngineRequest, RequestTooLong
from deployments.engine.sequence import Sequence
from tests.deployments.engine.bench import Bench


@pytest.fixture(scope="session")
def bench(fake_executor: type) -> Callable[..., Bench]:
    return lambda num_blocks=100, **limits: Bench(
        fake_executor(num_blocks, limits.get("block_size", 4), chunks=limits.get("kv_chunks", (None,))), **limits
    )


REQUESTS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 2), min_size=1, max_size=30),  # few distinct tokens: many shared prefixes
        st.integers(1, 20),  # max_tokens
        st.integers(1, 3),  # n
        st.integers(0, 6),  # steps before the next arrives
        st.integers(0, 12),  # abort when this many steps later it is not done; 0 never
    ),
    max_size=12,
)


@settings(max_examples=120, deadline=None)
@given(
    requests=REQUESTS,
    num_blocks=st.integers(13, 40),
    budget=st.integers(1, 40),
    caching=st.booleans(),
    chunks=st.sampled_from([(None,), (None, 8), (None, 6, 6), (None, None, 10)]),
)
def test_everything_finishes_with_its_own_tokens_whatever_the_pressure(
    bench: Callable[..., Bench],
    request_of: Callable[..., EngineRequest],
    completion_of: Callable[[list[int], int], list[int]],
    requests: list[tuple[list[int], int, int, int, int]],
    num_blocks: int,
    budget: int,
    caching: bool,
    chunks: tuple[int | None, ...],
) -> None:
    """num_blocks: of each group."""
    b = bench(num_blocks * len(chunks), max_num_batched_tokens=budget, enable_prefix_caching=caching, kv_chunks=chunks)
    step, aborts = 0, []
    expected: dict[tuple[str, int], list[int]] = {}
    for number, (prompt, max_tokens, n, pause, patience) in enumerate(requests):
        choices = b.scheduler.add(request_of(str(number), prompt, max_tokens, n=n))
        if patience:
            aborts.append((step + patience, choices))
        else:
            expected |= {(str(number), index): completion_of(prompt, max_tokens) for index in range(n)}
        for _ in range(pause):
            b.step()
            step += 1
            for due, victims in aborts:
                if due == step:
                    b.scheduler.remove(victims)
    for _, victims in aborts:
        b.scheduler.remove(victims)
    b.run()
    assert {key: b.outputs[key] for key in expected} == expected
    assert all(b.reasons[key] == "length" for key in expected)


def test_first_tokens_come_in_order_of_arrival(bench: Callable[..., Bench], request_of: Callable) -> None:
    b = bench(30, max_num_seqs=3)
    for number in range(10):
        b.scheduler.add(request_of(str(number), [number] * 20, 12))
    b.run()
    assert [name for name, _ in b.outputs] == [str(number) for number in range(10)]


def test_long_prompts_go_in_chunks_beside_decodes(bench: Callable[..., Bench], request_of: Callable) -> None:
    b = bench()
    b.scheduler.add(request_of("short", [1, 2], 30))
    b.step()
    (long,) = b.scheduler.add(request_of("long", list(range(50)), 2))
    counts = [{s.request.request_id: count for s, count in b.step().items()} for _ in range(4)]
    assert counts == [{"short": 1, "long": 15}] * 3 + [{"short": 1, "long": 5}]
    assert long.num_outputs == 1


def test_the_latest_arrival_is_preempted_and_loses_no_token(
    bench: Callable[..., Bench], request_of: Callable, completion_of: Callable
) -> None:
    b = bench(12, max_num_batched_tokens=64)
    for number in range(3):
        b.scheduler.add(request_of(str(number), [number] * 8, 24))
    while not b.scheduler.counts.preemptions:
        b.step()
    assert b.scheduler.waiting[0].request.request_id == "2"
    b.run()
    for number in range(3):
        assert b.outputs[str(number), 0] == completion_of([number] * 8, 24)


def test_what_can_never_fit_is_refused_with_the_numbers(bench: Callable[..., Bench], request_of: Callable) -> None:
    b = bench(10)
    b.scheduler.add(request_of("fits", [1] * 20, 21))  # 41 tokens, of which the last needs no block
    with pytest.raises(RequestTooLong, match="need 11 KV blocks of 4; there are 10"):
        b.scheduler.add(request_of("long", [1] * 20, 22))
    for prompt in ([], [1] * 200):
        with pytest.raises(RequestTooLong, match="max_model_len"):
            b.scheduler.add(request_of("odd", prompt, 1))
    b.run()
    assert len(b.outputs["fits", 0]) == 21


def test_a_known_prefix_is_not_computed_again(bench: Callable[..., Bench], request_of: Callable) -> None:
    b = bench()
    for name in ("first", "second"):
        b.scheduler.add(request_of(name, list(range(18)), 1))
        b.run()
    assert b.cached == {("first", 0): 0, ("second", 0): 16}
    assert (b.scheduler.counts.prefix_queries, b.scheduler.counts.prefix_hits) == (36, 16)
    assert b.executor.num_tokens == 18 + 2


def test_a_prompt_known_to_the_end_still_computes_its_last_token(
    bench: Callable[..., Bench], request_of: Callable, completion_of: Callable
) -> None:
    b = bench()
    for name in ("first", "second"):
        b.scheduler.add(request_of(name, list(range(16)), 3))
        b.run()
    assert b.cached["second", 0] == 12
    assert b.outputs["second", 0] == completion_of(list(range(16)), 3)


def test_without_prefix_caching_only_choices_of_one_request_share(
    bench: Callable[..., Bench], request_of: Callable
) -> None:
    b = bench(enable_prefix_caching=False)
    for name in ("first", "second"):
        b.scheduler.add(request_of(name, list(range(18)), 1, n=2))
        b.run()
    assert b.cached == {("first", 0): 0, ("first", 1): 16, ("second", 0): 0, ("second", 1): 16}
    assert b.scheduler.counts.prefix_queries == 0


def test_choices_share_the_blocks_of_their_prompt(bench: Callable[..., Bench], request_of: Callable) -> None:
    b = bench(max_num_batched_tokens=64)
    choices = b.scheduler.add(request_of("r", list(range(17)), 3, n=4))
    b.step()
    b.step()
    [first], *others = [choice.blocks for choice in choices]
    assert all(blocks[:4] == first[:4] for [blocks] in others)
    assert len({first[4], *(blocks[4] for [blocks] in others)}) == 4
    assert [b.pool.num_references(block) for block in first] == [4, 4, 4, 4, 1]
    assert b.executor.num_tokens == 17 + 1 + 3


def test_prompt_logprobs_cover_the_prompt_once_through_chunks_cache_and_preemption(
    bench: Callable[..., Bench], request_of: Callable
) -> None:
    b = bench(14)
    prompt = list(range(30))
    b.scheduler.add(request_of("warm", prompt, 1))
    b.run()
    b.scheduler.add(request_of("other", [5] * 8, 30))
    (asked,) = b.scheduler.add(request_of("asked", prompt, 8, prompt_logprobs=0))
    b.run()
    assert asked.prompt_logprobs[0] is None
    assert [entry.token_id for entry in asked.prompt_logprobs[1:]] == prompt[1:]


def test_stop_tokens_end_and_min_tokens_bans_them(
    bench: Callable[..., Bench], request_of: Callable, completion_of: Callable
) -> None:
    b = bench()
    tokens = completion_of([1, 2, 3], 5)
    b.scheduler.add(request_of("stop", [1, 2, 3], 20, stop_token_ids=(tokens[2],)))
    (late,) = b.scheduler.add(request_of("late", [1, 2, 3], 20, stop_token_ids=(tokens[2],), min_tokens=2))
    plan = b.scheduler.schedule()
    batch = b.batches.build(plan)
    assert [a.banned for a in batch.sampling.adjustments] == [(tokens[2],)]
    outputs = postprocess(b.scheduler, plan, batch, b.executor.step(batch.paged, batch.sampling))
    assert not outputs.finished
    late.append(0)
    late.append(0)
    assert late.num_outputs == 3
    b.scheduler.remove([late])
    for sequence in b.scheduler.running:
        b.outputs["stop", 0] = sequence.tokens[3:]
    b.run()
    assert b.outputs["stop", 0] == tokens[:3]
    assert b.reasons["stop", 0] == "stop"


def test_output_ends_at_the_context_length(bench: Callable[..., Bench], request_of: Callable) -> None:
    b = bench(max_model_len=20)
    b.scheduler.add(request_of("r", [1] * 15, 100))
    b.run()
    assert len(b.outputs["r", 0]) == 5
    assert b.reasons["r", 0] == "length"


def test_a_request_can_start_with_output_from_elsewhere(request_of: Callable, completion_of: Callable) -> None:
    tokens = completion_of([1, 2], 5)
    sequence = Sequence(request_of("r", [1, 2], 6, presence_penalty=0.5), 0, 0, outputs=tuple(tokens))
    assert (sequence.num_outputs, sequence.num_pending) == (5, 7)
    assert sequence.seen.counts.sum() == 5
    sequence.append(99)
    assert sequence.finish_reason(100) == "length"
