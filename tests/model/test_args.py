"""ModelArgs refuses what cannot be a model, by field and value."""

import pytest
from pydantic import ValidationError

from model import ModelArgs

GOOD = dict(dim=64, n_layers=2, n_heads=4, vocab_size=100)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 0}, r"dim\n.*greater than 0.*input_value=0"),
        ({"n_kv_heads": 3}, r"n_heads \(4\) must be a multiple of n_kv_heads \(3\)"),
        ({"dim": 66}, r"dim \(66\) must be a multiple of n_heads \(4\)"),
        ({"head_dim": 7}, r"head_dim \(7\) must be even"),
        ({"n_head": 4}, r"n_head\n.*Extra inputs"),
        ({"use_scaled_rope": True, "rope_low_freq_factor": 4}, r"rope_high_freq_factor \(1.0\) must not be below"),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(ValidationError, match=message):
        ModelArgs(**(GOOD | changes))


def test_hidden_width_follows_metas_rule():
    """Llama 2 7B has 11008, Llama 3 8B 14336, and an explicit width wins."""
    llama2 = ModelArgs(dim=4096, n_layers=1, n_heads=32, vocab_size=1, multiple_of=256)
    llama3 = ModelArgs(dim=4096, n_layers=1, n_heads=32, vocab_size=1, multiple_of=1024, ffn_dim_multiplier=1.3)
    assert (llama2.hidden_dim, llama3.hidden_dim) == (11008, 14336)
    assert ModelArgs(**GOOD, ffn_hidden_dim=123).hidden_dim == 123
