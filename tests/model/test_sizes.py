"""Counts of a rank against real models of that rank: fairscale's own layers, in a process group that is not there."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model import LLM, ModelArgs
from model.args import MoEArgs, Size, VisionArgs
from model.kv_cache import PagedCache
from model.layers import RotaryEmbedding
from model.sizes import (
    Share,
    expert_parameters,
    kv_values_per_block,
    num_experts,
    num_parameters,
    parameter_shapes,
    rotary_bytes,
    share_parameters,
)
from model.stage import Stage

SMALL = ModelArgs(
    dim=64, n_layers=6, n_heads=8, n_kv_heads=4, vocab_size=160, ffn_hidden_dim=96, max_seq_len=32,
    moe_args=MoEArgs(num_experts=4, interleave_moe_layer_step=2, hidden_dim=48),
    vision_args=VisionArgs(
        image_size=Size(height=16, width=16), patch_size=Size(height=4, width=4), dim=32, n_layers=2, n_heads=4,
        mlp_ratio=2.0, output_dim=32, pixel_shuffle_ratio=0.5,
    ),
)  # fmt: skip
TIED = ModelArgs(dim=24, n_layers=5, n_heads=4, vocab_size=40, tie_word_embeddings=True)

RANK = """
import sys, torch, torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from model import LLM, ModelArgs
from model.parallel import initialize_model_parallel
rank, tensor, stages = map(int, sys.argv[1:4])
dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=tensor * stages)
initialize_model_parallel(tensor, stages)
with FakeTensorMode():
    model = LLM(ModelArgs.model_validate_json(sys.argv[4]), initialize=False)
parameters = dict(model.named_parameters())
print(sum(p.numel() for p in parameters.values()))
print(sum(p.numel() for name, p in parameters.items() if ".feed_forward.experts." in name))
"""


@pytest.mark.parametrize("args", [SMALL, TIED], ids=["moe, vision", "tied"])
def test_a_whole_model_is_counted_as_it_is(args: ModelArgs) -> None:
    model = LLM(args)
    shapes = parameter_shapes(args)
    assert shapes == {name: parameter.shape for name, parameter in model.named_parameters()}
    assert share_parameters(shapes, args, Share()) == num_parameters(shapes)
    assert num_parameters(shapes) == sum(parameter.numel() for parameter in model.parameters())


def _of_rank(args: ModelArgs, rank: int, tensor: int, stages: int) -> tuple[int, int]:
    numbers = map(str, (rank, tensor, stages))
    command = [sys.executable, "-W", "ignore", "-c", RANK, *numbers, args.model_dump_json()]
    root = Path(__file__).parents[2]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root, timeout=60).stdout
    everything, experts = map(int, out.split())
    return everything, experts


@pytest.mark.parametrize(
    ("args", "rank", "tensor", "stages"),
    [(SMALL, 3, 4, 1), (SMALL, 3, 2, 2), (SMALL, 0, 1, 3), (TIED, 1, 2, 1), (TIED, 1, 1, 2)],
)
def test_a_rank_is_counted_as_it_is_built(args: ModelArgs, rank: int, tensor: int, stages: int) -> None:
    """Ranks of a stage are neighbours."""
    everything, experts = _of_rank(args, rank, tensor, stages)
    shapes = parameter_shapes(args)
    share = Share(Stage(rank // tensor, stages), tensor, tensor_rank=rank % tensor)
    assert share_parameters(shapes, args, share) == everything
    assert share_parameters(shapes, args, share._replace(experts=False)) == everything - experts


@pytest.mark.parametrize("args", [SMALL, TIED], ids=["moe, vision", "tied"])
def test_stages_hold_everything_once(args: ModelArgs) -> None:
    shapes = parameter_shapes(args)
    parts = [share_parameters(shapes, args, Share(Stage(index, 4))) for index in range(4)]
    assert sum(parts) == num_parameters(shapes)


def test_ranks_and_expert_servers_hold_everything_once() -> None:
    shapes = parameter_shapes(SMALL)
    rank = share_parameters(shapes, SMALL, Share(experts=False))
    assert rank + num_experts(SMALL) * expert_parameters(shapes, SMALL) == num_parameters(shapes)
    assert num_experts(SMALL) == 3 * 4


def test_keys_values_and_rotary_tables_are_as_large_as_the_real_ones() -> None:
    values = kv_values_per_block(SMALL, Share(), 16)
    assert values * 2 == PagedCache.bytes_per_block(SMALL, SMALL.kv_heads, 16, torch.bfloat16, SMALL.n_layers)
    assert kv_values_per_block(SMALL, Share(Stage(1, 3), 2), 16) == values // 3 // 2
    assert rotary_bytes(SMALL, 32) == sum(table.nbytes for table in RotaryEmbedding(SMALL).buffers())
