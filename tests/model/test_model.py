"""The plain transformer: against transformers' Llama, and against itself by every road."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from model import LLM, ModelArgs, TransformerInput
from model.kv_cache import PagedCache
from tests.model.paging import Pages

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def small_args(**changes) -> ModelArgs:
    fields = dict(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=128, max_seq_len=64, max_batch_size=4)
    return ModelArgs(**(fields | changes))


@pytest.fixture
def model() -> LLM:
    torch.manual_seed(0)
    return LLM(small_args())


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 128, (3, 20), generator=torch.Generator().manual_seed(1))


def half_split_rows(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Interleaved rotary rows, as Meta orders them, to the half-split order of transformers."""
    return weight.view(-1, head_dim // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def transformers_twin(model: LLM) -> LlamaForCausalLM:
    """transformers' Llama with the same weights."""
    args = model.args
    rope: dict = {"rope_type": "default", "rope_theta": args.rope_theta}
    if args.use_scaled_rope:
        rope |= {
            "rope_type": "llama3",
            "factor": args.rope_scaling_factor,
            "low_freq_factor": args.rope_low_freq_factor,
            "high_freq_factor": args.rope_high_freq_factor,
            "original_max_position_embeddings": args.rope_original_max_len,
        }
    twin = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=args.dim,
            num_hidden_layers=args.n_layers,
            num_attention_heads=args.n_heads,
            num_key_value_heads=args.kv_heads,
            head_dim=args.width_of_head,
            vocab_size=args.vocab_size,
            intermediate_size=args.hidden_dim,
            rms_norm_eps=args.norm_eps,
            rope_parameters=rope,
            tie_word_embeddings=args.tie_word_embeddings,
            max_position_embeddings=args.max_seq_len,
        )
    )
    names = {
        "wq": "self_attn.q_proj", "wk": "self_attn.k_proj", "wv": "self_attn.v_proj", "wo": "self_attn.o_proj",
        "w1": "mlp.gate_proj", "w3": "mlp.up_proj", "w2": "mlp.down_proj",
        "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    state = {"model.embed_tokens.weight": model.tok_embeddings.weight, "model.norm.weight": model.norm.weight}
    if model.output is not None:
        state["lm_head.weight"] = model.output.weight
    for name, weight in model.layers.named_parameters():
        layer, *_, part, _ = name.split(".")
        rows = half_split_rows(weight, args.width_of_head) if part in ("wq", "wk") else weight
        state[f"model.layers.{layer}.{names[part]}.weight"] = rows
    missing, unexpected = twin.load_state_dict(state, strict=False)
    assert not unexpected
    assert missing in ([], ["lm_head.weight"])
    return twin.eval()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_kv_heads": None},
        {"n_kv_heads": 1, "head_dim": 32},
        {"tie_word_embeddings": True, "ffn_hidden_dim": 96, "norm_eps": 1e-6},
        {"use_scaled_rope": True, "rope_scaling_factor": 8, "rope_high_freq_factor": 4, "rope_original_max_len": 16},
    ],
    ids=["gqa", "mha", "mqa-wide-head", "tied", "scaled-rope"],
)
def test_logits_equal_transformers(changes, tokens):
    torch.manual_seed(3)
    model = LLM(small_args(rope_theta=10000.0, **changes))
    with torch.no_grad():
        for parameter in model.parameters():  # larger than trained weights, so that logits are too
            parameter.add_(torch.randn_like(parameter) * 0.1)
        expected = transformers_twin(model)(tokens).logits
        torch.testing.assert_close(model(TransformerInput(tokens)).logits, expected, **TOLERANCE)


def test_gradients_flow_without_inference(model, tokens):
    model(TransformerInput(tokens)).logits.logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_inference_has_no_gradient_and_no_state_dict_entry(model, tokens):
    names = set(model.state_dict())
    assert not model.forward(TransformerInput(tokens), inference=True).logits.requires_grad
    assert set(model.state_dict()) == names


def test_cached_decode_equals_prefill(model, tokens):
    expected = model(TransformerInput(tokens)).logits
    pieces = [model.forward(TransformerInput(tokens[:, :10]), inference=True).logits]
    for position in range(10, 20):
        step = TransformerInput(tokens[:, position : position + 1], position)
        pieces.append(model.forward(step, inference=True).logits)
    torch.testing.assert_close(torch.cat(pieces, 1), expected, **TOLERANCE)


def test_rows_may_start_at_different_positions(model, tokens):
    expected = model(TransformerInput(tokens)).logits
    starts = torch.tensor([3, 11, 7])
    model.forward(TransformerInput(tokens[:, :11]), inference=True)
    nexts = torch.stack([tokens[row, start : start + 4] for row, start in enumerate(starts.tolist())])
    got = model.forward(TransformerInput(nexts, starts), inference=True).logits
    wanted = torch.stack([expected[row, start : start + 4] for row, start in enumerate(starts.tolist())])
    torch.testing.assert_close(got, wanted, **TOLERANCE)


def test_paged_steps_equal_one_prefill(model, tokens):
    """Ragged: sequences are prefilled in chunks of different sizes, mixed with decodes, in shuffled blocks."""
    expected = model(TransformerInput(tokens)).logits
    pages = Pages(model.args, sequences=3, length=20, block_size=4)
    cache = PagedCache(model.args, 2, pages.num_blocks, 4, torch.float32)
    schedule = [[(0, 0, 9)], [(0, 9, 10), (1, 0, 5)], [(0, 10, 11), (1, 5, 18), (2, 0, 20)], [(0, 11, 20), (1, 18, 20)]]
    for step in schedule:
        logits = model.step(pages.batch([(s, a, tokens[s, a:b]) for s, a, b in step]), cache)
        wanted = torch.cat([expected[s, a:b] for s, a, b in step])
        torch.testing.assert_close(logits, wanted, **TOLERANCE)


def test_load_state_dict_as_a_user_would(model, tokens):
    other = LLM(model.args)
    other.load_state_dict(model.state_dict(), strict=False)
    inputs = TransformerInput(tokens=tokens, tokens_position=0)
    torch.testing.assert_close(other(inputs).logits, model(inputs).logits, rtol=0, atol=0)


def test_beyond_the_context_is_an_error(model):
    with pytest.raises(ValueError, match="position 64 is beyond max_seq_len"):
        model(TransformerInput(torch.zeros(1, 2, dtype=torch.int64), 63))


def test_more_rows_than_the_cache_is_an_error(model):
    with pytest.raises(ValueError, match=r"holds 4 sequences.*asked for 5"):
        model.forward(TransformerInput(torch.zeros(5, 2, dtype=torch.int64)), inference=True)


def test_rotary_tables_stay_float32_in_a_bfloat16_model(model):
    cosine = model.rope.cosine.clone()
    model.bfloat16()
    assert model.layers[0].attention.wq.weight.dtype is torch.bfloat16
    torch.testing.assert_close(model.rope.cosine, cosine, rtol=0, atol=0)
