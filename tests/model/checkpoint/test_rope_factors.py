from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from model.checkpoint import CheckpointError
from model.checkpoint.gguf_file import StoredTensor
from model.checkpoint.rope_factors import rope_fields

FILE = Path("some.gguf")
THETA = {"llama.rope.freq_base": 500000.0}


def _stored(values: torch.Tensor) -> StoredTensor:
    return StoredTensor(tuple(values.shape), GGMLQuantizationType.F32, values.float().numpy().view(np.uint8))


@pytest.mark.parametrize(("head_dim", "factor"), [(128, 8.0), (64, 32.0)])
def test_llama3_settings_are_recovered_from_what_transformers_computes(head_dim, factor):
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = LlamaConfig(head_dim=head_dim, max_position_embeddings=131072, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1.0 / 500000.0 ** (torch.arange(0, head_dim, 2).float() / head_dim)
    assert rope_fields(THETA, _stored(plain / scaled), head_dim, FILE) == {
        "rope_theta": 500000.0,
        "use_scaled_rope": True,
        "rope_scaling_factor": pytest.approx(factor),
        "rope_low_freq_factor": 1.0,
        "rope_high_freq_factor": 4.0,
        "rope_original_max_len": 8192,
    }


def test_factors_of_one_and_no_factors_are_no_scaling():
    assert rope_fields(THETA, _stored(torch.ones(32)), 64, FILE) == {"rope_theta": 500000.0}
    assert rope_fields({}, None, 64, FILE) == {"rope_theta": 10000.0}


def test_factors_of_another_rule_are_refused():
    with pytest.raises(CheckpointError, match=r"some\.gguf.*not that of Llama 3"):
        rope_fields(THETA, _stored(torch.linspace(1, 8, 32)), 64, FILE)


def test_factors_of_another_head_width_are_refused():
    with pytest.raises(CheckpointError, match=r"shape \[16\], not \[32\]"):
        rope_fields(THETA, _stored(torch.ones(16)), 64, FILE)
