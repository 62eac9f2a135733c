"""The packed CPU path against plain torch, and its promise: results do not depend on the company they keep."""

import copy

import pytest
import torch
import torch.nn.functional as F

from model import LLM, ModelArgs, TransformerInput
from model.args import MoEArgs
from model.kernels import cpu
from model.kv_cache import PagedCache
from model.packed import PackedCache, PackedSwiGLU, can_pack, pack
from tests.model.paging import Pages

pytestmark = pytest.mark.skipif(not cpu.available(), reason="needs a CPU with AVX512-BF16 and a C++ compiler")

IROPE = {
    "attention_chunk_size": 40, "nope_layer_interval": 3, "use_qk_norm": True,
    "attn_temperature_tuning": True, "floor_scale": 32.0,
}  # fmt: skip


def bf16_model(**changes) -> LLM:
    fields = dict(dim=96, n_layers=3, n_heads=6, n_kv_heads=2, vocab_size=200, ffn_hidden_dim=160, max_seq_len=512)
    torch.manual_seed(0)
    return LLM(ModelArgs(**(fields | changes))).bfloat16().requires_grad_(False)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 9, 16, 33, 130])
@pytest.mark.parametrize(("n", "k"), [(16, 2), (48, 64), (200, 96), (576, 1536)])
def test_matmul(rows, n, k):
    x, weight = torch.randn(rows, k).bfloat16(), torch.randn(n, k).bfloat16()
    packed = cpu.PackedLinear(weight)
    expected = x.float() @ weight.float().T
    torch.testing.assert_close(packed(x, torch.float32), expected, rtol=1e-4, atol=1e-4 * k**0.5)
    torch.testing.assert_close(packed(x).float(), expected, rtol=1e-2, atol=1e-2 * k**0.5)


def test_matmul_reads_strided_rows():
    wide, weight = torch.randn(5, 300).bfloat16(), torch.randn(32, 64).bfloat16()
    x = wide[:, 100:164]
    torch.testing.assert_close(cpu.PackedLinear(weight)(x), cpu.PackedLinear(weight)(x.contiguous()), rtol=0, atol=0)


@pytest.mark.parametrize("rows", [1, 6, 20])
def test_swiglu(rows):
    x, gate, up = torch.randn(rows, 64).bfloat16(), torch.randn(48, 64).bfloat16(), torch.randn(48, 64).bfloat16()
    x32 = x.float()
    expected = F.silu(x32 @ gate.float().T) * (x32 @ up.float().T)
    torch.testing.assert_close(cpu.PackedSwiGLU(gate, up)(x).float(), expected, rtol=1e-2, atol=1e-2)


def test_swiglu_of_extreme_gates_is_finite():
    gate = torch.tensor([[1e4], [-1e4]]).repeat(8, 2).bfloat16()
    out = cpu.PackedSwiGLU(gate, torch.ones(16, 2).bfloat16())(torch.ones(1, 2).bfloat16())
    torch.testing.assert_close(out.float()[0], F.silu(gate.float().sum(1)) * 2, rtol=1e-2, atol=1e-2)


def test_rms_norm():
    x, weight = torch.randn(40, 96).bfloat16() * 30, torch.randn(96).bfloat16()
    expected = F.rms_norm(x.float(), (96,), weight.float(), 1e-5)
    torch.testing.assert_close(cpu.rms_norm(x, weight, 1e-5).float(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_heads": 3, "n_kv_heads": 3, "head_dim": 64},
        {"n_heads": 12, "n_kv_heads": 1, "head_dim": 32},
        {"n_heads": 2, "n_kv_heads": 2, "head_dim": 128, "tie_word_embeddings": True},
        IROPE,
        {"moe_args": MoEArgs(num_experts=4, hidden_dim=64, interleave_moe_layer_step=2)},
        {"moe_args": MoEArgs(num_experts=4, hidden_dim=64, top_k=2, router="softmax", shared_expert=False)},
    ],
    ids=["gqa", "mha", "mqa", "tied", "irope", "llama4-moe", "mixtral-moe"],
)
def test_packed_model_is_as_near_to_float32_as_plain_torch(changes):
    """Ragged chunks and decodes over shuffled blocks, prompts longer than one rescaling of the softmax."""
    model = bf16_model(**changes)
    tokens = torch.randint(0, 200, (3, 300))
    plain = model(TransformerInput(tokens)).logits.float()
    exact = copy.deepcopy(model).float()(TransformerInput(tokens)).logits
    assert can_pack(model.args, torch.bfloat16, 16)
    pack(model)
    pages = Pages(model.args, sequences=3, length=300, block_size=16)
    cache = PackedCache(model.args, model.args.kv_heads, pages.num_blocks, 16, torch.bfloat16)
    packed = torch.full_like(exact, torch.nan)
    for step in [[(0, 0, 99)], [(0, 99, 100), (1, 0, 17)], [(1, 17, 300), (2, 0, 300), (0, 100, 299)], [(0, 299, 300)]]:
        logits = model.step(pages.batch([(s, a, tokens[s, a:b]) for s, a, b in step]), cache)
        for (s, a, b), rows in zip(step, logits.split([b - a for _, a, b in step]), strict=True):
            packed[s, a:b] = rows
    error, plain_error = (packed - exact).square().mean().sqrt(), (plain - exact).square().mean().sqrt()
    assert error < 1.05 * plain_error < 0.05 * exact.std()


@pytest.mark.parametrize("changes", [{}, IROPE | {"moe_args": MoEArgs(num_experts=4, hidden_dim=64, top_k=2)}])
def test_bits_do_not_depend_on_batch_or_chunking(changes):
    """What failover and preemption rely on, in bfloat16: not close but equal."""
    model = pack(bf16_model(**changes))
    tokens = torch.randint(0, 200, (9, 200))
    pages = Pages(model.args, sequences=9, length=200, block_size=32)

    def run(schedule: list[list[tuple[int, int, int]]]) -> dict[tuple[int, int], torch.Tensor]:
        cache, rows = PackedCache(model.args, 2, pages.num_blocks, 32, torch.bfloat16), {}
        for step in schedule:
            logits = model.step(pages.batch([(s, a, tokens[s, a:b]) for s, a, b in step]), cache)
            rows |= zip([(s, p) for s, a, b in step for p in range(a, b)], logits, strict=True)
        return rows

    alone = run([[(s, 0, 200)] for s in range(9)])
    together = run([[(s, 0, 200) for s in range(9)]])
    token_by_token = run([[(s, p, p + 1) for s in range(9)] for p in range(200)])
    chunked = run([[(s, 0, 10 + s) for s in range(9)], [(s, 10 + s, 200) for s in range(9)]])
    for other in (together, token_by_token, chunked):
        assert all(torch.equal(row, other[key]) for key, row in alone.items())


def test_a_plain_cache_is_not_for_packed_models():
    model = bf16_model()
    pages = Pages(model.args, sequences=1, length=16, block_size=16)
    packed_cache = PackedCache(model.args, 2, 1, 16, torch.bfloat16)
    with pytest.raises(TypeError, match="packed models only"):
        model.step(pages.batch([(0, 0, torch.zeros(4, dtype=torch.int64))]), packed_cache)


@pytest.mark.parametrize("changes", [{"head_dim": 24}, {"ffn_hidden_dim": 100}, {"dim": 72}])
def test_odd_shapes_stay_on_torch(changes):
    fields = dict(dim=96, n_layers=1, n_heads=6, vocab_size=10, ffn_hidden_dim=160)
    assert not can_pack(ModelArgs(**(fields | changes)), torch.bfloat16, 16)


def test_other_dtypes_and_blocks_stay_on_torch():
    args = bf16_model().args
    assert not can_pack(args, torch.float32, 16)
    assert not can_pack(args, torch.bfloat16, 8)
    assert PagedCache.bytes_per_block(args, 2, 16, torch.bfloat16, 3) == 2 * 3 * 16 * 2 * 16 * 2


def test_several_feed_forwards_in_one_call_compute_the_same_bits():
    swiglus = [
        PackedSwiGLU(*(torch.randn(*shape).bfloat16() for shape in ((48, 64), (64, 48), (48, 64)))) for _ in "abc"
    ]
    x, counts = torch.randn(17, 64).bfloat16(), [1, 12, 4]
    alone = torch.cat([swiglu(rows) for swiglu, rows in zip(swiglus, x.split(counts), strict=True)])
    together = cpu.swiglus(x, [swiglu.w13 for swiglu in swiglus], [swiglu.w2 for swiglu in swiglus], counts)
    assert torch.equal(together, alone)
    assert cpu.swiglus(x[:0], [], [], []).shape == (0, 64)
