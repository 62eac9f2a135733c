"""Counts of a rank against real models of that rank: fairscale's own layers, in a process group that is not there."""

import json
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

RANKS = [(SMALL, 3, 4, 1), (SMALL, 3, 2, 2), (SMALL, 0, 1, 3), (TIED, 1, 2, 1), (TIED, 1, 1, 2)]
"""A model, a rank's number, the size of tensor parallelism, and of stages."""

COUNT = """
import json, sys, torch.distributed as dist
from fairscale.nn.model_parallel import destroy_model_parallel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from model import LLM, ModelArgs
from model.parallel import initialize_model_parallel
for args, rank, tensor, stages in json.loads(sys.argv[1]):
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=tensor * stages)
    initialize_model_parallel(tensor, stages)
    with FakeTensorMode():
        model = LLM(ModelArgs.model_validate(args), initialize=False)
    parameters = dict(model.named_parameters())
    print(sum(p.numel() for p in parameters.values()), end=" ")
    print(sum(p.numel() for name, p in parameters.items() if ".feed_forward.experts." in name))
    destroy_model_parallel()
    dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def counted() -> list[tuple[int, ...]]:
    """Of each of RANKS, built in a process of their own: all parameters, and those of routed experts."""
    ranks = json.dumps([[args.model_dump(mode="json"), *numbers] for args, *numbers in RANKS])
    command = [sys.executable, "-W", "ignore", "-c", COUNT, ranks]
    root = Path(__file__).parents[2]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root, timeout=60).stdout
    return [tuple(map(int, line.split())) for line in out.splitlines()]


@pytest.mark.parametrize("args", [SMALL, TIED], ids=["moe, vision", "tied"])
def test_a_whole_model_is_counted_as_it_is(args: ModelArgs) -> None:
    model = LLM(args)
    shapes = parameter_shapes(args)
    assert shapes == {name: parameter.shape for name, parameter in model.named_parameters()}
    assert share_parameters(shapes, args, Share()) == num_parameters(shapes)
    assert num_parameters(shapes) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("place", range(len(RANKS)))
def test_a_rank_is_counted_as_it_is_built(counted: list[tuple[int, ...]], place: int) -> None:
    """Ranks of a stage are neighbours."""
    args, rank, tensor, stages = RANKS[place]
    everything, experts = counted[place]
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
