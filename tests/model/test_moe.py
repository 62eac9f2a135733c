"""Grouped experts against the form in which every expert computes every token."""

import pytest
import torch

from benchmarks.moe import all_experts, forms_of, measure, random_layer
from model.args import MoEArgs


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize("router", ["sigmoid", "softmax"])
@pytest.mark.parametrize("shared_expert", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("tokens", [0, 1, 3, 50])
def test_grouped_equals_dense(router, shared_expert, top_k, tokens):
    torch.manual_seed(tokens)
    args = MoEArgs(num_experts=4, top_k=top_k, hidden_dim=24, router=router, shared_expert=shared_expert)
    layer = random_layer(32, args)
    x = torch.randn(tokens, 32)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), all_experts(layer, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("router", ["sigmoid", "softmax"])
def test_gradients_equal_those_of_the_dense_form(router):
    torch.manual_seed(1)
    layer = random_layer(16, MoEArgs(num_experts=4, top_k=2, hidden_dim=24, router=router))
    x, target = torch.randn(20, 16), torch.randn(20, 16)
    gradients = []
    for form in (layer, lambda x: all_experts(layer, x)):
        layer.zero_grad()
        (form(x) * target).sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in layer.named_parameters()})
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0].values())
    for name, expected in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], expected, rtol=1e-4, atol=1e-5, msg=name)


def test_tokens_that_all_go_to_one_expert():
    torch.manual_seed(2)
    layer = random_layer(32, MoEArgs(num_experts=8, hidden_dim=24))
    x = torch.randn(1, 32).expand(40, -1)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), all_experts(layer, x), rtol=1e-5, atol=1e-5)


def test_grouped_is_several_times_as_fast_as_dense():
    """16 experts, 256 tokens: 16 times the work of top-1, of which a busy machine leaves at least 3."""
    torch.manual_seed(3)
    layer = random_layer(512, MoEArgs(num_experts=16, hidden_dim=512))
    times = measure(forms_of(layer), torch.randn(256, 512), rounds=5)
    assert min(times["dense"]) > 3 * min(times["grouped"])
