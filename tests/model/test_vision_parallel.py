"""The image encoder cut over two ranks: the same embeddings and logits as whole."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from model import LLM, ModelArgs, TransformerInput
from model.args import MoEArgs, Size, VisionArgs
from model.checkpoint.slices import rank_region
from model.datatypes import MaskedEmbedding

RANKS = 2
ARGS = ModelArgs(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=64, multiple_of=16, max_seq_len=32,
    moe_args=MoEArgs(num_experts=4),
    vision_args=VisionArgs(
        image_size=Size(height=8, width=16), patch_size=Size(height=2, width=4), dim=48, n_layers=2, n_heads=4,
        mlp_ratio=2.0, output_dim=24, pixel_shuffle_ratio=0.5,
    ),
)  # fmt: skip


def forward(model: LLM) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings [2, 4, 32] of two tiles, logits [1, 12, 64] of a prompt with them."""
    generator = torch.Generator().manual_seed(1)
    tiles = torch.randint(0, 256, (2, 3, 8, 16), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(0, 64, (1, 12), generator=generator)
    mask = torch.tensor([False] * 2 + [True] * 8 + [False] * 2)[None, :, None]
    with torch.no_grad():
        pixels = tiles.float() / 127.5 - 1
        seen = model.vision_embeddings([[pixels]], mask, model.tok_embeddings(tokens))
        return model.embed_tiles(tiles), model(TransformerInput(tokens, 0, MaskedEmbedding(seen, mask))).logits


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    whole = torch.load(f"{folder}/weights.pt")
    model = LLM(ARGS)
    model.load_state_dict({k: v[rank_region(k, v.shape, rank, RANKS)] for k, v in whole.items()})
    torch.save(forward(model), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LLM(ARGS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    mp.spawn(run_rank, args=(str(tmp_path),), nprocs=RANKS)
    expected = forward(model)
    for rank in range(RANKS):
        for got, wanted in zip(torch.load(tmp_path / f"rank{rank}.pt"), expected, strict=True):
            scale = wanted.abs().max()
            torch.testing.assert_close(got / scale, wanted / scale, rtol=1e-5, atol=1e-5)
