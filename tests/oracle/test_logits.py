"""Prefill logits of our model and checkpoint loader against transformers', fp32, same file."""

from typing import Any

import pytest
import torch

from model import LLM
from model.checkpoint import open_checkpoint
from model.datatypes import TransformerInput
from tests.oracle.conftest import GGUF


@pytest.fixture(scope="module")
def ours() -> LLM:
    checkpoint = open_checkpoint(str(GGUF))
    args = checkpoint.args.model_copy(update={"max_seq_len": 512})
    model = LLM(args, initialize=False)
    checkpoint.load_into(model)
    return model.float().eval()


@torch.no_grad()
def test_prefill_logits_are_those_of_transformers(
    ours: LLM, transformers_smollm2: Any, prompts: list[list[int]]
) -> None:
    worst = 0.0
    for prompt in prompts[::3]:
        tokens = torch.tensor([prompt])
        difference = ours(TransformerInput(tokens=tokens)).logits - transformers_smollm2(tokens).logits
        worst = max(worst, difference.abs().max().item())
    assert worst < 1e-4
