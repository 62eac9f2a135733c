"""Which layers share a block table, what sequences hold of the blocks, and that what is given back is never read."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import LLM, ModelArgs, TransformerInput
from model.args import MoEArgs
from model.kernels import cpu
from model.kv_cache import PagedCache
from model.kv_groups import BlockNeeds, kv_groups, layers_of_all_stages, layers_per_block, num_unseen
from model.packed import PackedCache, pack
from model.stage import Stage
from tests.model.paging import Pages

SMALL = dict(dim=96, n_heads=6, n_kv_heads=2, vocab_size=200, ffn_hidden_dim=160, max_seq_len=512)
IROPE = dict(use_qk_norm=True, attn_temperature_tuning=True, floor_scale=32.0)


def args_of(layers: int, interval: int | None, chunk: int | None) -> ModelArgs:
    return ModelArgs(**SMALL, **IROPE, n_layers=layers, nope_layer_interval=interval, attention_chunk_size=chunk)


def test_llama4_has_one_full_group_and_three_chunked_ones_spread_over_its_stages() -> None:
    args = args_of(48, 4, 64)
    groups = kv_groups(args)
    assert [(len(group.layers), group.chunk) for group in groups] == [(12, None), (12, 64), (12, 64), (12, 64)]
    assert groups[0].layers == tuple(range(3, 48, 4))
    for count in (1, 2, 3, 4, 6, 12):
        assert layers_of_all_stages(args, count) == 12, "no stage wastes a part of its blocks"


@pytest.mark.parametrize(
    ("interval", "chunk", "chunks"),
    [(None, None, [None]), (2, None, [None]), (2, 512, [None]), (None, 64, [64]), (9, 64, [64]), (1, 64, [None])],
)
def test_layers_of_one_kind_are_one_group(interval: int | None, chunk: int | None, chunks: list[int | None]) -> None:
    groups = kv_groups(args_of(6, interval, chunk))
    assert [group.chunk for group in groups] == chunks
    assert groups[0].layers == tuple(range(6))


@settings(deadline=None)
@given(layers=st.integers(1, 60), interval=st.integers(1, 12), chunk=st.integers(1, 600), stages=st.integers(1, 8))
def test_every_layer_is_in_one_group_of_its_kind(layers: int, interval: int, chunk: int, stages: int) -> None:
    args = args_of(layers, interval, chunk)
    groups = kv_groups(args)
    assert sorted(layer for group in groups for layer in group.layers) == list(range(layers))
    assert len({len(group.layers) for group in groups}) == 1
    if chunk < args.max_seq_len:
        assert all((group.chunk is None) == args.is_nope_layer(layer) for group in groups for layer in group.layers)
    if stages <= layers:
        for index in range(stages):
            mine = Stage(index, stages).layers(layers)
            held = [len(set(group.layers) & set(mine)) for group in groups]
            assert layers_per_block(groups, mine) == max(held)


@settings(deadline=None)
@given(
    full=st.integers(0, 3), chunked=st.integers(0, 3), chunk=st.integers(1, 70), block_size=st.integers(1, 20),
    step=st.integers(1, 90), length=st.integers(1, 400), data=st.data(),
)  # fmt: skip
def test_no_sequence_holds_more_than_is_said(
    full: int, chunked: int, chunk: int, block_size: int, step: int, length: int, data: st.DataObject
) -> None:
    chunks: tuple[int | None, ...] = (None,) * full + (chunk,) * chunked or (None,)
    needs, position, most = BlockNeeds(chunks, block_size, step), 0, 0
    while position < length:
        end = min(length, position + data.draw(st.integers(1, step)))
        whole = -(-end // block_size)
        most = max(most, sum(whole - num_unseen(position, each, block_size) for each in chunks))
        position = end
    assert most <= needs.held(length)
    assert needs.held(length) <= needs.held(length + 1)


@settings(deadline=None)
@given(
    full=st.integers(0, 3), chunked=st.integers(0, 3), chunk=st.integers(1, 70), block_size=st.integers(1, 20),
    step=st.integers(1, 90), num_blocks=st.integers(0, 300),
)  # fmt: skip
def test_the_longest_sequence_fits_and_a_longer_one_does_not(
    full: int, chunked: int, chunk: int, block_size: int, step: int, num_blocks: int
) -> None:
    needs = BlockNeeds((None,) * full + (chunk,) * chunked or (None,), block_size, step)
    longest = needs.longest(num_blocks)
    if longest is None:
        assert needs.held(10**9) <= num_blocks
        return
    assert needs.held(longest) <= num_blocks < needs.held(longest + 1)
    assert needs.fitting(num_blocks) <= longest


class Freeing:
    """Paged steps in which all that chunked layers cannot see any more is NaN, and their tables lead there."""

    def __init__(self, model: LLM, cache: PagedCache, pages: Pages) -> None:
        self.model, self.cache, self.pages = model, cache, pages
        self.poison = cache.num_blocks - 1  # nobody's
        self._fill(torch.tensor([self.poison]))
        self.num_freed = 0

    def step(self, pieces: list[tuple[int, int, torch.Tensor]]) -> torch.Tensor:
        batch = self.pages.batch(pieces)
        tables = batch.block_tables.clone()
        for group, table in zip(self.cache.groups, tables, strict=True):
            for row, (_, start, _) in zip(table, pieces, strict=True):
                unseen = num_unseen(start, group.chunk, self.cache.block_size)
                self._fill(row[:unseen])
                row[:unseen] = self.poison
                self.num_freed += unseen
        return self.model.step(replace(batch, block_tables=tables), self.cache)

    def _fill(self, blocks: torch.Tensor) -> None:
        for part in (self.cache.keys, self.cache.values):
            part.unflatten(1, (-1, self.cache.block_size))[:, blocks.long()] = torch.nan


def freeing(model: LLM, kind: type[PagedCache], sequences: int, length: int, block_size: int) -> Freeing:
    pages = Pages(model.args, sequences, length, block_size)
    dtype = next(model.parameters()).dtype
    cache = kind(model.args, model.args.kv_heads, pages.num_blocks + 1, block_size, dtype)
    return Freeing(model, cache, pages)


PIECES = [
    [(0, 0, 9)],
    [(0, 9, 10), (1, 0, 33)],
    [(0, 10, 11), (1, 33, 34), (2, 0, 120)],
    [(0, 11, 70), (1, 34, 100)],
    [(0, 70, 71), (1, 100, 101), (2, 120, 121)],
    [(2, 121, 160), (0, 71, 160), (1, 101, 160)],
]
"""Ragged: chunks of prompts beside decodes, across the borders of many chunks."""


@pytest.mark.parametrize(("chunk", "block_size"), [(16, 4), (12, 8), (10, 16), (64, 16)])
@torch.no_grad()
def test_freed_blocks_are_never_read(chunk: int, block_size: int) -> None:
    """Paged steps over NaN wherever a chunk has ended equal one prefill, in float32."""
    torch.manual_seed(0)
    model = LLM(args_of(6, 3, chunk).model_copy(update={"moe_args": MoEArgs(num_experts=4, hidden_dim=64)}))
    tokens = torch.randint(0, 200, (3, 160))
    expected = model(TransformerInput(tokens)).logits
    steps = freeing(model, PagedCache, 3, 160, block_size)
    for pieces in [*PIECES[:-1], *[[(s, p, p + 1) for s, p in ((0, 71), (1, 101), (2, 121))]]]:
        got = steps.step([(s, a, tokens[s, a:b]) for s, a, b in pieces])
        wanted = torch.cat([expected[s, a:b] for s, a, b in pieces])
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert steps.num_freed > 0


@pytest.mark.skipif(not cpu.available(), reason="needs a CPU with AVX512-BF16 and a C++ compiler")
@pytest.mark.parametrize(("chunk", "block_size"), [(16, 16), (40, 16), (24, 32), (64, 16)])
def test_freed_blocks_are_never_read_by_the_kernels(chunk: int, block_size: int) -> None:
    """The same bits, whether chunks that have ended are there or NaN, alone or in company."""
    torch.manual_seed(0)
    model = pack(LLM(args_of(6, 3, chunk)).bfloat16().requires_grad_(False))
    tokens = torch.randint(0, 200, (3, 160))

    def run(step, schedule) -> dict[tuple[int, int], torch.Tensor]:
        rows = {}
        for pieces in schedule:
            logits = step([(s, a, tokens[s, a:b]) for s, a, b in pieces])
            rows |= zip([(s, p) for s, a, b in pieces for p in range(a, b)], logits, strict=True)
        return rows

    pages = Pages(model.args, 3, 160, block_size)
    cache = PackedCache(model.args, 2, pages.num_blocks, block_size, torch.bfloat16)
    kept = run(lambda pieces: model.step(pages.batch(pieces), cache), [[(s, 0, 160)] for s in range(3)])
    token_by_token = [[(s, p, p + 1) for s in range(3)] for p in range(160)]
    for schedule in (PIECES, token_by_token):
        steps = freeing(model, PackedCache, 3, 160, block_size)
        freed = run(steps.step, schedule)
        assert steps.num_freed > 0
        assert freed.keys() == kept.keys()
        assert all(torch.equal(row, kept[key]) for key, row in freed.items())
