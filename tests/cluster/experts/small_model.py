"""A small mixture of experts on disk."""

import json
from pathlib import Path

import torch

from model import LLM, ModelArgs
from model.args import MoEArgs

ARGS = ModelArgs(
    dim=96, n_layers=4, n_heads=6, n_kv_heads=2, vocab_size=200, ffn_hidden_dim=160, max_seq_len=256,
    moe_args=MoEArgs(num_experts=8, hidden_dim=64, interleave_moe_layer_step=2),
)  # fmt: skip


def write_model(folder: Path) -> Path:
    """Layers 1 and 3 have eight experts."""
    torch.manual_seed(0)
    model = LLM(ARGS)
    for name, parameter in model.named_parameters():
        if ".experts." in name or "router" in name:
            parameter.data.normal_(std=0.3)
    torch.save(model.state_dict(), folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(ARGS.model_dump(mode="json")))
    return folder
