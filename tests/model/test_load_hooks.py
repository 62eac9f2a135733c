"""Every old naming of weights loads into the same model, with the same logits."""

import pytest
import torch

from model import LLM, ModelArgs, TransformerInput
from model.args import MoEArgs
from tests.model.old_names import NAMINGS

ARGS = ModelArgs(
    dim=32, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=12, vocab_size=64, multiple_of=16, max_seq_len=32,
    nope_layer_interval=4, moe_args=MoEArgs(num_experts=4, interleave_moe_layer_step=2),
)  # fmt: skip
TOKENS = torch.arange(20).reshape(2, 10) * 3


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> LLM:
    torch.manual_seed(1)
    model = LLM(ARGS)
    for name, parameter in model.named_parameters():  # no norm like another
        if "norm" in name:
            torch.nn.init.uniform_(parameter.data, 0.5, 1.5)
    return model


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_old_naming_gives_the_same_logits(model, naming):
    state = NAMINGS[naming](model.state_dict())
    assert state.keys() != model.state_dict().keys()
    names = list(state)
    other = LLM(ARGS)
    other.load_state_dict(state)
    assert list(state) == names  # the caller's dictionary is left alone
    expected = model(TransformerInput(TOKENS)).logits
    torch.testing.assert_close(other(TransformerInput(TOKENS)).logits, expected, rtol=0, atol=0)


def test_parts_of_the_model_take_old_names_too(model):
    other = LLM(ARGS)
    for naming in ("fused wqkv", "norm inside wqkv", "flat experts", "shared expert", "norm inside feed_forward"):
        state = NAMINGS[naming](model.state_dict())
        prefix = "layers.1."
        other.layers[1].load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({"layers.0.attention.wqkv.weight": torch.zeros(96, 32)}), r"Unexpected.*wqkv\.weight"),
        (lambda s: s.update({"layers.1.feed_forward.norm.weight": torch.zeros(32)}), r"Unexpected.*norm\.weight"),
        (lambda s: s.update({"norm.weight": torch.empty(0)}), r"size mismatch for norm\.weight"),
        (lambda s: s.update({"layers.0.attention.bias": torch.empty(1)}), r"Unexpected.*attention\.bias"),
        (lambda s: s.pop("layers.1.feed_forward.experts.w1"), r"Missing.*experts\.w1"),
    ],
    ids=["both namings", "both norms", "an empty parameter", "an unknown vector", "a missing one"],
)
def test_what_does_not_belong_is_still_refused(model, change, message):
    state = dict(model.state_dict())
    change(state)
    with pytest.raises(RuntimeError, match=message):
        LLM(ARGS).load_state_dict(state)


def test_a_fused_matrix_of_the_wrong_height_is_named(model):
    state = NAMINGS["fused wqkv"](model.state_dict())
    state["layers.2.attention.wqkv.weight"] = torch.zeros(97, 32)
    with pytest.raises(ValueError, match=r"layers\.2\.attention\.wqkv\.weight has 97 rows.* 8 equal parts"):
        LLM(ARGS).load_state_dict(state)
