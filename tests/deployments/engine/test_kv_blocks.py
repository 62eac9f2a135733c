"""Blocks of models with chunked layers: given back at the end of a chunk, found again by prompts, never mixed up."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.shard import Shard
from deployments.config import ROOT
from deployments.engine.blocks import BlockPool, OutOfBlocks
from deployments.engine.kv_blocks import KVBlocks
from deployments.engine.sequence import Sequence
from model import TransformerInput
from model.datatypes import PagedBatch
from model.kv_groups import BlockNeeds
from model.sampling import SampledTokens, SamplingBatch
from tests.deployments.engine.bench import Bench

CHUNKS = (None, 16, 16, 16)
"""As Llama 4's: one full group, three chunked."""
BLOCK = 4
TINY_SCOUT = ROOT / "examples/tiny-scout/checkpoint"


@pytest.fixture
def bench(fake_executor: type) -> Callable[..., Bench]:
    return lambda num_blocks=400, chunks=CHUNKS, **limits: Bench(
        fake_executor(num_blocks, BLOCK, chunks=chunks), kv_chunks=chunks, **limits
    )


def held(b: Bench, sequence: Sequence) -> list[int]:
    """Blocks of each group."""
    return [len(blocks) for blocks in b.scheduler.kv.held(sequence)]


def test_ten_chunks_take_chunked_layers_no_more_than_one_chunk_and_a_step(
    bench: Callable[..., Bench], request_of: Callable, completion_of: Callable
) -> None:
    b = bench(max_num_batched_tokens=8)
    prompt = list(range(90))
    (sequence,) = b.scheduler.add(request_of("r", prompt, 70))
    most, most_decoding = 0, 0
    while b.step():
        full, *chunked = held(b, sequence) or [0, 0, 0, 0]
        assert len(set(chunked)) == 1
        most = max(most, chunked[0])
        if sequence.num_outputs > 16:
            most_decoding = max(most_decoding, chunked[0])
            assert b.pool.usage == pytest.approx((full + 3 * chunked[0]) / b.pool.num_blocks)
    assert most <= (16 + 8) // BLOCK
    assert most_decoding == 16 // BLOCK
    assert b.outputs["r", 0] == completion_of(prompt, 70)


def test_a_cache_too_small_for_all_layers_serves_a_long_sequence(
    bench: Callable[..., Bench], request_of: Callable, completion_of: Callable
) -> None:
    """40 blocks of 160 tokens in the full group, 3 * 6 in the others; all in every group would be 160."""
    b = bench(58, max_num_batched_tokens=8)
    b.scheduler.add(request_of("r", list(range(60)), 101))
    b.run()
    assert b.outputs["r", 0] == completion_of(list(range(60)), 101)
    assert not b.scheduler.counts.preemptions


def test_a_prefix_is_known_wherever_its_last_chunk_is(bench: Callable[..., Bench], request_of: Callable) -> None:
    """The first chunks were given back and their blocks taken by others; the full group still has everything."""
    b = bench(max_num_batched_tokens=64)
    prompt = list(range(100, 145))  # two chunks and 13 tokens
    b.scheduler.add(request_of("first", prompt, 1))
    b.run()
    b.scheduler.add(request_of("second", [*prompt, 1, 2, 3], 4))
    b.run()
    assert b.cached["second", 0] == 44
    b.scheduler.add(request_of("within", [*prompt[:31], 5], 4))  # the second chunk, given back but not yet overwritten
    b.run()
    assert b.cached["within", 0] == 28


def test_a_prefix_whose_last_chunk_is_lost_is_known_to_the_chunk_before(
    bench: Callable[..., Bench], request_of: Callable, completion_of: Callable
) -> None:
    b = bench(60, max_num_batched_tokens=64)
    prompt = list(range(100, 145))
    b.scheduler.add(request_of("first", prompt, 1))
    b.run()
    kv, sequence = b.scheduler.kv, Sequence(request_of("x", prompt, 1), 0, 0)
    lost = {name for name, block in b.pool._by_hash.items() if len(name) == 34 and name[-1] == 2 and block}
    last = sequence.hashes(11, BLOCK)[9] + b"\0\2"  # of the tenth block, in the third group
    assert last in lost
    del b.pool._by_hash[last]
    assert kv._longest_known(sequence) == 9  # 36 tokens: the block before it is in the same chunk, and there
    del b.pool._by_hash[sequence.hashes(11, BLOCK)[8] + b"\0\2"]
    assert kv._longest_known(sequence) == 8  # at the border of a chunk nothing of it is needed


def test_choices_share_the_chunk_that_they_begin_in(
    bench: Callable[..., Bench], request_of: Callable, completion_of: Callable
) -> None:
    b = bench(max_num_batched_tokens=64)
    choices = b.scheduler.add(request_of("r", list(range(45)), 30, n=3))
    b.step()
    b.step()
    assert [choice.num_unseen for choice in choices] == [8, 8, 8]
    for group in range(4):
        first = choices[0].blocks[group][8:11]
        assert all(choice.blocks[group][8:11] == first for choice in choices)
        assert [b.pool.num_references(block) for block in first] == [3, 3, 3]
    b.run()
    assert all(b.outputs["r", index] == completion_of(list(range(45)), 30) for index in range(3))


def test_a_preempted_sequence_finds_its_last_chunk_or_computes_it_again(
    bench: Callable[..., Bench], request_of: Callable, completion_of: Callable
) -> None:
    b = bench(70, max_num_batched_tokens=32)
    for number in range(4):
        b.scheduler.add(request_of(str(number), [number] * 30, 70))
    b.run()
    assert b.scheduler.counts.preemptions
    for number in range(4):
        assert b.outputs[str(number), 0] == completion_of([number] * 30, 70)


@settings(max_examples=150, deadline=None)
@given(
    chunks=st.sampled_from([(None,), (None, 8), (None, 6, 6), (8,), (None, None, 10, 10)]),
    num_blocks=st.integers(8, 80),
    operations=st.lists(
        st.tuples(st.sampled_from(["start", "compute", "compute", "compute", "end"]), st.integers(0, 12)), max_size=60
    ),
)
def test_references_add_up_whatever_happens(
    request_of: Callable, chunks: tuple[int | None, ...], num_blocks: int, operations: list[tuple[str, int]]
) -> None:
    """Against a slow count: a block has as many references as sequences hold it, and is of one group at a time."""
    pool = BlockPool(num_blocks)
    kv = KVBlocks(pool, BlockNeeds(chunks, BLOCK, 12))
    alive: list[Sequence] = []
    for number, (operation, size) in enumerate(operations):
        if operation == "start":
            tokens = [number % 2] * (4 * size + 1)  # many shared beginnings
            sequence = Sequence(request_of(str(number), tokens, 1), 0, number)
            if kv.start(sequence, 0, is_known=True):
                alive.append(sequence)
                assert sequence.num_computed < len(tokens)
        elif alive and operation == "compute":
            sequence = alive[size % len(alive)]
            count = min(size, sequence.num_pending)
            end = sequence.num_computed + count
            if kv.missing(sequence, end) > pool.num_free:
                with pytest.raises(OutOfBlocks):
                    kv.grow(sequence, end)
                kv.release(alive.pop(size % len(alive)))
            else:
                kv.grow(sequence, end)
                sequence.num_computed = end
                kv.computed(sequence)
        elif alive:
            kv.release(alive.pop(size % len(alive)))
        by_group = [[block for each in alive for block in list(kv.held(each))[group]] for group in range(len(chunks))]
        everything = [block for blocks in by_group for block in blocks]
        assert [pool.num_references(block) for block in range(num_blocks)] == [
            everything.count(block) for block in range(num_blocks)
        ]
        assert sum(len(set(blocks)) for blocks in by_group) == len(set(everything))
    for sequence in alive:
        kv.release(sequence)
    assert pool.leaks() == []


class Poisoned:
    """A shard in whose cache all blocks that nothing can lead to are NaN before every step."""

    def __init__(self, shard: Shard) -> None:
        self.shard, self.num_blocks, self.bench = shard, shard.num_blocks, None
        self.num_poisoned = 0
        self._clean: set[int] = set()

    def step(self, batch: PagedBatch, sampling: SamplingBatch) -> SampledTokens:
        pool = self.bench.pool
        known = set(pool._by_hash.values())
        held = {block for block in range(self.num_blocks) if pool.num_references(block)}
        for part in (self.shard._cache.keys, self.shard._cache.values):
            blocks = part.unflatten(1, (-1, self.shard.block_size))
            new = sorted(held - self._clean)
            blocks[:, new] = 0  # of unknown content, and read as padding at most
            blocks[:, sorted(set(range(self.num_blocks)) - held - known)] = torch.nan
        self._clean = held | known
        self.num_poisoned += self.num_blocks - len(held | known)
        return self.shard.step(batch, sampling)


def greedy(shard: Shard, prompt: list[int], count: int) -> list[int]:
    """What the model says without a cache."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(shard._model(TransformerInput(torch.tensor([tokens]))).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("num_blocks", [400, 30])
def test_a_real_model_says_the_same_with_freed_blocks_overwritten(
    request_of: Callable[..., object], num_blocks: int
) -> None:
    """tiny-scout (chunks of 64) in float32: prompts across chunk borders, prefix hits, choices, preemption."""
    shard = Shard(
        path=str(TINY_SCOUT), dtype="float32", block_size=16, max_num_seqs=8, max_model_len=320,
        max_num_batched_tokens=48, kv_cache_memory=num_blocks * 2 * 2 * 16 * 2 * 32 * 4, num_threads=1,
    )  # fmt: skip
    assert (shard.kv_chunks, shard.num_blocks) == ((None, 64), num_blocks)
    executor = Poisoned(shard)
    b = Bench(
        executor, max_num_batched_tokens=48, max_model_len=320, block_size=16, kv_chunks=shard.kv_chunks
    )  # fmt: skip
    executor.bench = b
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(20, 500, (length,), generator=generator).tolist() for length in (150, 60))
    b.scheduler.add(request_of("first", first, 40))
    b.scheduler.add(request_of("second", second, 90, n=2))
    b.run()
    b.scheduler.add(request_of("again", [*first[:147], 30], 60))  # a hit in the third chunk
    b.scheduler.add(request_of("border", [*first[:128], 40], 70))  # a hit at a border
    b.run()
    for name, prompt, count in (
        ("first", first, 40), ("second", second, 90), ("again", [*first[:147], 30], 60),
        ("border", [*first[:128], 40], 70),
    ):  # fmt: skip
        assert b.outputs[name, 0] == greedy(shard, prompt, count), name
    assert b.outputs["second", 1] == b.outputs["second", 0]
    assert executor.num_poisoned
    if num_blocks == 400:
        assert (b.cached["again", 0], b.cached["border", 0]) == (144, 128)
    else:
        assert b.scheduler.counts.preemptions
