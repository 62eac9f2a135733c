import pytest

from model.args import ModelArgs, MoEArgs
from model.checkpoint import CheckpointError
from model.checkpoint.slices import check_world_size, possible_world_sizes, rank_region

ARGS = ModelArgs(dim=576, n_layers=1, n_heads=9, n_kv_heads=3, vocab_size=49152, ffn_hidden_dim=1536)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("layers.12.attention.wq.weight", (12, 4), (slice(8, 12), slice(0, 4))),
        ("layers.0.feed_forward.w2.weight", (4, 12), (slice(0, 4), slice(8, 12))),
        ("layers.0.attention.wo.weight", (4, 12), (slice(0, 4), slice(8, 12))),
        ("tok_embeddings.weight", (12, 4), (slice(8, 12), slice(0, 4))),
        ("layers.0.ffn_norm.weight", (12,), (slice(0, 12),)),
        ("layers.1.feed_forward.router_DE", (12, 4), (slice(0, 12), slice(0, 4))),
        ("layers.1.feed_forward.experts.w1", (3, 6, 12), (slice(0, 3), slice(0, 6), slice(8, 12))),
        ("layers.1.feed_forward.experts.w2", (3, 12, 6), (slice(0, 3), slice(8, 12), slice(0, 6))),
        ("layers.1.feed_forward.shared_expert.w2.weight", (6, 12), (slice(0, 6), slice(8, 12))),
    ],
)
def test_the_last_of_three_ranks_holds(name, shape, expected):
    assert rank_region(name, shape, rank=2, world_size=3) == expected


def test_a_parameter_that_is_not_in_the_table_is_refused_by_name():
    with pytest.raises(CheckpointError, match=r"layers\.0\.attention\.wx\.weight"):
        rank_region("layers.0.attention.wx.weight", (4, 4), 0, 2)


def test_world_sizes_that_do_not_divide_are_refused_with_those_that_do():
    assert possible_world_sizes(ARGS) == [1, 3]
    check_world_size(ARGS, rank=2, world_size=3)
    with pytest.raises(CheckpointError, match=r"size of 2 does not divide n_heads \(9\), n_kv_heads \(3\); .* 1, 3"):
        check_world_size(ARGS, rank=0, world_size=2)


def test_only_widths_that_a_model_has_must_divide():
    moe = {"num_experts": 2, "hidden_dim": 100}
    everywhere = ModelArgs(dim=64, n_layers=2, n_heads=4, vocab_size=64, ffn_hidden_dim=33, moe_args=moe)
    assert possible_world_sizes(everywhere) == [1, 2, 4]
    half = everywhere.model_copy(update={"moe_args": MoEArgs(**moe, interleave_moe_layer_step=2)})
    assert possible_world_sizes(half) == [1]


@pytest.mark.parametrize("rank", [-1, 3])
def test_a_rank_outside_the_world_is_refused(rank):
    with pytest.raises(CheckpointError, match="not one of 3"):
        check_world_size(ARGS, rank, world_size=3)
