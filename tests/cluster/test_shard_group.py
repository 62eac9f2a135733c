"""Groups of real processes compute what one process does: the same tokens, in every split."""

import dataclasses
import functools
import json
from array import array
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from cluster.experts.client import ExpertsUnavailable
from cluster.experts.weights import HeldExperts
from cluster.frames import Frame, Kind, decode, encode
from cluster.parallel import Layout, Rendezvous, World, backend, open_store
from cluster.shard import Shard
from cluster.shard_group import ShardGroup, follow
from model import LLM, ModelArgs
from model.args import MoEArgs, Size, VisionArgs
from model.checkpoint import open_checkpoint
from model.datatypes import PagedBatch
from model.kernels import cpu
from model.kv_groups import layers_of_all_stages
from model.model import ExpertsOfLayer
from model.moe import Ready
from model.sampling import SamplingBatch
from tests.cluster.ranks import on_ranks

BLOCK = 16
PROMPTS = [list(range(3, 3 + length)) for length in (1, 5, 40, 17)]
OUTPUTS = 12
GGUF = Path(__file__).parents[2] / "models/SmolLM2-135M-Instruct.Q4_1.gguf"
SMALL = dict(dim=64, n_layers=4, n_heads=4, n_kv_heads=4, vocab_size=192, ffn_hidden_dim=128, max_seq_len=256)
IROPE = dict(attention_chunk_size=24, nope_layer_interval=4, use_qk_norm=True, attn_temperature_tuning=True)
VISION = VisionArgs(
    image_size=Size(height=8, width=8), patch_size=Size(height=2, width=2), dim=32, n_layers=2, n_heads=4,
    mlp_ratio=2.0, output_dim=24, pixel_shuffle_ratio=0.5,
)  # fmt: skip
TILES = np.arange(2 * 3 * 8 * 8, dtype=np.uint8).reshape(2, 3, 8, 8)


def save_model(folder: Path, **changes: Any) -> str:
    """A random model as Meta would publish it, its logits of order one."""
    torch.manual_seed(0)
    args = ModelArgs(**(SMALL | changes))
    model = LLM(args)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    folder.mkdir(exist_ok=True)
    torch.save(model.state_dict(), folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(args.model_dump(mode="json")))
    return str(folder)


def greedy(executor: Any, prompts: list[list[int]], count: int) -> tuple[list[list[int]], torch.Tensor]:
    """`count` tokens after each prompt, prefilled in chunks, and their logits: [prompts, count, vocabulary]."""
    tokens = [list(prompt) for prompt in prompts]
    logits: list[list[torch.Tensor]] = [[] for _ in prompts]
    longest = max(map(len, prompts)) + count
    groups, blocks = len(executor.kv_chunks), -(-longest // BLOCK)
    tables = torch.arange(groups * len(prompts) * blocks, dtype=torch.int32).view(groups, len(prompts), blocks)
    done = [0] * len(prompts)
    while any(len(row) < len(prompt) + count for row, prompt in zip(tokens, prompts, strict=True)):
        ends = [min(len(row), d + 20) for row, d in zip(tokens, done, strict=True)]
        order = sorted(range(len(prompts)), key=lambda s: ends[s] - done[s] > 1)
        starts = torch.tensor([0, *(ends[s] - done[s] for s in order)]).cumsum(0).int()
        batch = PagedBatch(
            tokens=torch.tensor([t for s in order for t in tokens[s][done[s] : ends[s]]]),
            positions=torch.tensor([p for s in order for p in range(done[s], ends[s])]),
            query_starts=starts,
            context_lens=torch.tensor([ends[s] for s in order], dtype=torch.int32),
            block_tables=tables[:, order],
            logit_rows=starts[1:].long() - 1,
            num_decodes=sum(ends[s] - done[s] == 1 for s in order),
        )
        rows = executor.logits(batch)
        assert executor.step(batch, SamplingBatch(len(order))).tokens == rows.argmax(1).tolist()
        for s, row in zip(order, rows, strict=True):
            if ends[s] == len(tokens[s]):
                tokens[s].append(int(row.argmax()))
                logits[s].append(row.float())
            done[s] = ends[s]
    answers = [row[len(prompt) : len(prompt) + count] for row, prompt in zip(tokens, prompts, strict=True)]
    return answers, torch.stack([torch.stack(rows[:count]) for rows in logits])


def options(path: str, dtype: str) -> dict[str, Any]:
    return dict(
        path=path, dtype=dtype, block_size=BLOCK, max_num_seqs=8, max_model_len=128, kv_cache_memory=2**22,
        num_threads=1,
    )  # fmt: skip


def run_rank(rank: int, layout: Layout, address: str, cases: list[dict[str, Any]], count: int) -> Any:
    """On rank 0: what `greedy` gives for each case, and an image's embeddings if the model sees."""
    world = World(layout, rank, address, start_seconds=60)
    found = []
    for case in cases:
        if rank:
            follow(world, case, rank_timeout_s=20)
            continue
        group = ShardGroup(world, rank_timeout_s=20, on_lost=lambda reason: None)
        group.load(case)
        image = group.encode_image(TILES) if group.args.vision_args else None
        tokens, logits = greedy(group, PROMPTS, count)
        _, alone = greedy(group, PROMPTS[2:3], count)
        found.append((group.num_blocks, tokens, logits, image, torch.equal(alone[0], logits[2])))
        group.stop()
    return found


def run_group(tensor: int, stages: int, cases: list[dict[str, Any]], hosts: list[str] | None = None) -> Any:
    rendezvous = Rendezvous()
    layout = Layout(tensor, stages, tuple(hosts or ["here"] * (tensor * stages)))
    try:
        return on_ranks(layout.size, run_rank, layout, rendezvous.address, cases, OUTPUTS)[0]
    finally:
        rendezvous.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    moe = MoEArgs(num_experts=4, hidden_dim=64, interleave_moe_layer_step=2)
    return {
        "tied": save_model(folder / "tied", tie_word_embeddings=True, n_layers=5),
        "irope": save_model(folder / "irope", **IROPE, moe_args=moe, vision_args=VISION),
    }


@pytest.fixture(scope="module")
def alone(models: dict[str, str]) -> dict[tuple[str, str], Any]:
    """What one process gives, by model and dtype."""
    found = {}
    for name, path in models.items():
        for dtype in ("float32", "bfloat16"):
            shard = Shard(**options(path, dtype))
            image = shard.encode_image(TILES) if shard.args.vision_args else None
            found[name, dtype] = (shard.num_blocks, *greedy(shard, PROMPTS, OUTPUTS), image)
    return found


@pytest.mark.parametrize(
    ("tensor", "stages", "hosts"),
    [
        (2, 1, None),
        (4, 1, None),
        (1, 2, None),
        (1, 3, None),
        (2, 2, None),
        (2, 1, ["one", "other"]),
        (2, 2, ["one", "one", "other", "other"]),
    ],
    ids=["tp2", "tp4", "pp2", "pp3", "tp2pp2", "gloo", "two-hosts"],
)
def test_every_split_gives_the_tokens_of_one_process(models, alone, tensor, stages, hosts) -> None:
    keys = list(alone)
    got = run_group(tensor, stages, [options(models[name], dtype) for name, dtype in keys], hosts)
    for key, (blocks, tokens, logits, image, alone_is_equal) in zip(keys, got, strict=True):
        expected_blocks, expected_tokens, expected_logits, expected_image = alone[key]
        args = open_checkpoint(models[key[0]]).args.model_copy(update={"max_seq_len": 128})
        # Stages that have layers of few KV groups hold less in a block of the same size.
        assert blocks == expected_blocks * layers_of_all_stages(args, 1) // layers_of_all_stages(args, stages)
        scale = expected_logits.std()
        if key[1] == "float32":
            assert tokens == expected_tokens
            torch.testing.assert_close(logits / scale, expected_logits / scale, rtol=1e-4, atol=1e-4)
        else:  # tokens after the first of each prompt may follow from different ones
            assert alone_is_equal or not cpu.available(), "the company that a sequence keeps shows in its bits"
            first = (logits[:, 0] - expected_logits[:, 0]) / scale
            assert first.square().mean().sqrt() < 0.05
        if expected_image is not None:
            error = (image.float() - expected_image.float()).abs().max() / expected_image.float().abs().max()
            assert error < (1e-5 if key[1] == "float32" else 0.05)


class WholeExperts:
    """Every expert whole on every rank, computed as on an expert server."""

    is_whole = True

    def __init__(self, held: HeldExperts, layer: int) -> None:
        self.held, self.layer, self.given = held, layer, array("d")

    def submit(self, x_kD: torch.Tensor, experts_k: torch.Tensor, routed_k: torch.Tensor) -> Ready:
        rows = zip(x_kD, experts_k.tolist(), strict=True)
        outputs = [self.held.compute(self.layer, [expert], [1], x[None]) for x, expert in rows]
        return Ready(torch.cat(outputs) if outputs else x_kD)


def whole_experts(path: str) -> ExpertsOfLayer:
    checkpoint = open_checkpoint(path)
    held = HeldExperts(checkpoint, torch.bfloat16)
    for layer in filter(checkpoint.args.is_moe_layer, range(checkpoint.args.n_layers)):
        for expert in range(4):
            held.load((layer, expert))
    return functools.partial(WholeExperts, held)


@pytest.mark.skipif(not cpu.available(), reason="needs a CPU with AVX512-BF16 and a C++ compiler")
def test_bits_do_not_depend_on_company_where_ranks_share_whole_experts(models) -> None:
    case = options(models["irope"], "bfloat16") | {"experts": functools.partial(whole_experts, models["irope"])}
    ((_, _, _, _, alone_is_equal),) = run_group(2, 1, [case])
    assert alone_is_equal


class FragileExperts(WholeExperts):
    """They are gone while there is a file."""

    gone: Path

    def submit(self, x_kD: torch.Tensor, experts_k: torch.Tensor, routed_k: torch.Tensor) -> Any:
        return self if self.gone.exists() else super().submit(x_kD, experts_k, routed_k)

    def wait(self, give_up: float | None = None) -> torch.Tensor:
        raise ExpertsUnavailable(f"no server for {self.gone.name}")


def fragile_experts(path: str, gone: Path) -> ExpertsOfLayer:
    whole = whole_experts(path)

    def of_layer(layer: int) -> FragileExperts:
        experts = FragileExperts(whole(layer).held, layer)
        experts.gone = gone
        return experts

    return of_layer


def run_fragile_rank(rank: int, layout: Layout, address: str, path: str, folder: Path) -> Any:
    """On rank 0: tokens before and after experts of each rank were gone, and what was raised in between."""
    world = World(layout, rank, address, start_seconds=60)
    case = options(path, "bfloat16") | {"experts": functools.partial(fragile_experts, path, folder / f"rank-{rank}")}
    if rank:
        return follow(world, case, rank_timeout_s=20)
    lost: list[str] = []
    group = ShardGroup(world, rank_timeout_s=20, on_lost=lost.append)
    group.load(case)
    answers, raised = [greedy(group, PROMPTS, 4)[0]], []
    for other in range(layout.size):
        (folder / f"rank-{other}").touch()
        for ask in (lambda: greedy(group, PROMPTS, 4), group.probe):
            with pytest.raises(ExpertsUnavailable) as error:
                ask()
            raised.append(str(error.value))
        (folder / f"rank-{other}").unlink()
        group.probe()
        answers.append(greedy(group, PROMPTS, 4)[0])
    group.stop()
    return answers, raised, lost


@pytest.mark.skipif(not cpu.available(), reason="needs a CPU with AVX512-BF16 and a C++ compiler")
@pytest.mark.parametrize(
    ("tensor", "hosts"), [(2, ["here"] * 2), (2, ["one", "other"]), (1, ["here"] * 2)], ids=["tp2", "gloo", "pp2"]
)
def test_experts_that_are_gone_cost_the_step_and_not_the_group(models, tmp_path, tensor, hosts) -> None:
    """Nor the probe. Which of two ranks finds no server for its experts makes no difference."""
    layout, rendezvous = Layout(tensor, 2 // tensor, tuple(hosts)), Rendezvous()
    try:
        answers, raised, lost = on_ranks(2, run_fragile_rank, layout, rendezvous.address, models["irope"], tmp_path)[0]
    finally:
        rendezvous.close()
    assert raised == [f"no server for rank-{rank}" for rank in (0, 0, 1, 1)]
    assert answers == answers[:1] * 3
    assert not lost


@pytest.mark.skipif(not GGUF.exists(), reason="needs `make model`")
@pytest.mark.parametrize(("tensor", "stages"), [(3, 1), (1, 2)], ids=["tp3", "pp2"])
def test_a_real_model_says_the_same_in_every_split(tensor: int, stages: int) -> None:
    case = options(str(GGUF), "float32") | {"kv_cache_memory": 2**26}
    expected, logits = greedy(Shard(**case), PROMPTS, OUTPUTS)
    ((_, tokens, got, _, _),) = run_group(tensor, stages, [case])
    assert tokens == expected
    torch.testing.assert_close(got, logits, rtol=1e-4, atol=1e-3)


def test_groups_on_one_host_share_memory_and_others_use_gloo() -> None:
    layout = Layout(2, 2, ("a", "a", "b", "b"))
    assert backend(layout, layout.tensor_groups()) == "shm"
    assert backend(layout, layout.pipeline_groups()) == "gloo"
    assert backend(layout, [range(4)]) == "gloo"
    assert backend(layout, layout.tensor_groups(), "cuda") == "nccl"
    assert layout.neighbours(3) == [2, 3]
    with pytest.raises(ValueError, match="2 stages of 1 ranks need 2 hosts"):
        Layout(1, 2, ("a",))


def test_a_rendezvous_between_hosts_listens_on_its_address_alone() -> None:
    rendezvous = Rendezvous("127.0.0.1")
    store = rendezvous.store(2, timedelta(seconds=5))
    other = open_store(rendezvous.address, 2, timedelta(seconds=5))
    other.set("key", "value")
    assert store.get("key") == b"value"
    listening = [each.laddr for each in psutil.Process().net_connections() if each.status == psutil.CONN_LISTEN]
    port = int(rendezvous.address.rpartition("|")[2])
    assert [address.ip for address in listening if address.port == port] == ["127.0.0.1"]


def test_frames_come_back_as_they_went() -> None:
    batch = PagedBatch(
        tokens=torch.arange(7), positions=torch.arange(7) * 2, query_starts=torch.tensor([0, 1, 7], dtype=torch.int32),
        context_lens=torch.tensor([4, 9], dtype=torch.int32),
        block_tables=torch.arange(12, dtype=torch.int32).view(2, 2, 3),
        logit_rows=torch.empty(0, dtype=torch.int64), num_decodes=1, image_rows=torch.tensor([3]),
        image_embeddings=torch.randn(1, 5).bfloat16(),
    )  # fmt: skip
    strided = dataclasses.replace(batch, block_tables=torch.arange(24, dtype=torch.int32).view(2, 2, 6)[..., ::2])
    for sent in (batch, strided, dataclasses.replace(batch, image_rows=None, image_embeddings=None)):
        got = decode(encode(Frame(Kind.STEP, sent))).batch
        assert got is not None
        assert got.num_decodes == 1
        for field in dataclasses.fields(PagedBatch):
            if field.name != "num_decodes":
                a, b = getattr(got, field.name), getattr(sent, field.name)
                assert (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b))
    tiles = decode(encode(Frame(Kind.IMAGE, tiles=torch.from_numpy(TILES)))).tiles
    assert tiles is not None
    assert (tiles.numpy() == TILES).all()
    assert decode(encode(Frame(Kind.BEAT))) == Frame(Kind.BEAT)
