"""The whole text model against Meta's `llama-models`, on configurations drawn at random.

Prefill only: at decode the reference applies no mask, so its chunked layers see earlier chunks.
Decode and paged steps are compared with our own prefill.
"""

import random

import pytest
import torch

from model import LLM, ModelArgs, TransformerInput
from model.args import MoEArgs
from model.kv_cache import PagedCache
from tests.model.paging import Pages

meta = pytest.importorskip("llama_models.llama4.model", reason="llama-models is a development dependency")
meta_args = pytest.importorskip("llama_models.llama4.args")
meta_datatypes = pytest.importorskip("llama_models.llama4.datatypes")

LENGTH = 24


def draw(seed: int) -> ModelArgs:
    """A small model with features switched on and off at random."""
    rng = random.Random(seed)
    head_dim, n_heads = rng.choice([8, 16, 32]), rng.choice([2, 4, 6])
    moe = None
    if rng.random() < 0.7:
        experts = rng.choice([2, 4, 16])
        moe = MoEArgs(
            num_experts=experts, top_k=rng.choice([1, 2]), interleave_moe_layer_step=rng.choice([1, 2]),
            auto_scale_F=rng.random() < 0.5, capacity_factor=rng.choice([1.0, 1.5]),
        )  # fmt: skip
    return ModelArgs(
        dim=head_dim * n_heads, n_layers=rng.choice([1, 2, 4]), n_heads=n_heads,
        n_kv_heads=rng.choice([k for k in (1, 2, n_heads) if n_heads % k == 0]), vocab_size=rng.choice([96, 256]),
        multiple_of=rng.choice([16, 64]), ffn_dim_multiplier=rng.choice([1.0, 1.3]), ffn_exp=rng.choice([2.0, 4.0]),
        norm_eps=rng.choice([1e-5, 1e-6]), rope_theta=rng.choice([1e4, 5e5]), use_scaled_rope=rng.random() < 0.5,
        rope_scaling_factor=rng.choice([8.0, 16.0]), rope_high_freq_factor=rng.choice([2.0, 4.0]),
        attention_chunk_size=rng.choice([None, 4, 8, 64]), nope_layer_interval=rng.choice([None, 2, 4]),
        use_qk_norm=rng.random() < 0.5, attn_temperature_tuning=rng.random() < 0.5,
        floor_scale=rng.choice([4.0, 8192.0]), max_seq_len=64, max_batch_size=2, moe_args=moe,
    )  # fmt: skip


def reference(args: ModelArgs, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """Meta's model of the same shape, its weights at random and large enough to make logits of order one."""
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, *_, **__: self)
    fields = args.model_dump(include=set(meta_args.ModelArgs.model_fields) - {"moe_args", "head_dim"})
    if args.moe_args is not None:
        fields["moe_args"] = args.moe_args.model_dump(include=set(meta_args.MoEArgs.model_fields))
    model = meta.Transformer(meta_args.ModelArgs(**fields))
    enlarge(model)
    return model


@torch.no_grad()
def enlarge(model: torch.nn.Module) -> None:
    """Weights at random, large enough to make logits of order one."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.uniform_(0.5, 1.5)
        else:
            width = parameter.shape[-2] if "experts.w" in name or "router" in name else parameter.shape[-1]
            parameter.normal_(std=1.5 / width**0.5)


def assert_equal(got: torch.Tensor, expected: torch.Tensor, seed: int, args: ModelArgs) -> None:
    scale = expected.abs().max()
    message = f"seed {seed}: {args!r}"
    torch.testing.assert_close(got / scale, expected / scale, rtol=1e-5, atol=1e-5, msg=lambda m: f"{message}\n{m}")


@pytest.mark.parametrize("seed", range(60))
def test_logits_equal_metas(seed, monkeypatch):
    args = draw(seed)
    torch.manual_seed(seed)
    model = LLM(args)  # also sets up the model-parallel group that the reference wants
    theirs = reference(args, monkeypatch)
    model.load_state_dict(theirs.state_dict())
    tokens = torch.randint(0, args.vocab_size, (2, LENGTH))
    expected = theirs(meta_datatypes.TransformerInput(tokens=tokens, tokens_position=0)).logits
    assert_equal(model(TransformerInput(tokens)).logits, expected, seed, args)


@pytest.mark.parametrize("seed", range(20))
def test_decode_equals_prefill(seed):
    """Token by token, rows starting at different places, prompts that cross chunk borders."""
    args = draw(seed)
    torch.manual_seed(seed)
    model = LLM(args)
    enlarge(model)
    tokens = torch.randint(0, args.vocab_size, (2, LENGTH))
    expected = model(TransformerInput(tokens)).logits
    model.forward(TransformerInput(tokens[:, :7]), inference=True)
    starts = torch.tensor([7, 3])
    for step in range(LENGTH - 7):
        now = torch.stack([tokens[0, 7 + step], tokens[1, 3 + step]])[:, None]
        got = model.forward(TransformerInput(now, starts + step), inference=True).logits[:, 0]
        assert_equal(got, torch.stack([expected[0, 7 + step], expected[1, 3 + step]]), seed, args)


@pytest.mark.parametrize("seed", range(20))
@torch.no_grad()
def test_paged_steps_equal_prefill(seed):
    """Sequences prefilled in pieces of any size beside others that decode, in shuffled blocks."""
    args = draw(seed)
    torch.manual_seed(seed)
    model = LLM(args)
    enlarge(model)
    tokens = torch.randint(0, args.vocab_size, (3, LENGTH))
    expected = model(TransformerInput(tokens)).logits
    pages = Pages(args, sequences=3, length=LENGTH, block_size=4)
    cache = PagedCache(args, args.kv_heads, pages.num_blocks, 4, torch.float32)
    rng, done = random.Random(seed), [0, 0, 0]
    while min(done) < LENGTH:
        going = [sequence for sequence in range(3) if done[sequence] < LENGTH and rng.random() < 0.7]
        pieces = [(s, done[s], min(done[s] + rng.choice([1, 1, 3, 9]), LENGTH)) for s in going]
        pieces.sort(key=lambda piece: piece[2] - piece[1] > 1)  # decodes come first
        if pieces:
            got = model.step(pages.batch([(s, start, tokens[s, start:end]) for s, start, end in pieces]), cache)
            assert_equal(got, torch.cat([expected[s, start:end] for s, start, end in pieces]), seed, args)
        for sequence, _, end in pieces:
            done[sequence] = end
