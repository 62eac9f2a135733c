"""Two ranks that each load their part compute what one process does, from every format and every old naming."""

import json

import pytest
import torch

from model import LLM, TransformerInput
from model.checkpoint import open_checkpoint
from model.checkpoint.slices import rank_region
from tests.model.checkpoint.ranks import on_ranks
from tests.model.old_names import NAMINGS

TOKENS = torch.arange(24).reshape(2, 12) * 3


@torch.no_grad()
def logits_of_rank(rank, world_size, folders, states):
    """[cases, batch, length, vocabulary]: of each folder, then of each state dict under each of its old names."""
    logits = []
    for folder in folders:
        checkpoint = open_checkpoint(folder)
        model = LLM(checkpoint.args, initialize=False)
        checkpoint.load_into(model, rank, world_size)
        logits.append(model(TransformerInput(TOKENS)).logits)
    whole = torch.load(states)
    part = {name: tensor[rank_region(name, tensor.shape, rank, world_size)] for name, tensor in whole.items()}
    for naming in NAMINGS.values():
        model = LLM(open_checkpoint(folders[0]).args)
        model.load_state_dict(naming(part))
        logits.append(model(TransformerInput(TOKENS)).logits)
    return torch.stack(logits)


@pytest.fixture
def folders(llama4_folder, tmp_path_factory):
    """Llama 4 of `transformers`, and the same as two files of Meta's with all their old names."""
    checkpoint = open_checkpoint(llama4_folder)
    model = LLM(checkpoint.args, initialize=False)
    checkpoint.load_into(model)
    meta = tmp_path_factory.mktemp("meta")
    for rank in range(2):
        part = {k: v[rank_region(k, v.shape, rank, 2)].clone() for k, v in model.state_dict().items()}
        torch.save(NAMINGS["all at once"](part), meta / f"consolidated.{rank:02d}.pth")
    (meta / "params.json").write_text(json.dumps(checkpoint.args.model_dump(mode="json")))
    torch.save(model.state_dict(), meta / "state.pt")
    return llama4_folder, meta


@torch.no_grad()
def test_two_ranks_compute_what_one_does(folders, mixtral_folder, tmp_path_factory, tiny_llama):
    llama4, meta = folders
    dense = tmp_path_factory.mktemp("dense")
    tiny_llama(vocab_size=96).save_pretrained(dense)
    cases = [llama4, meta, mixtral_folder, dense]
    alone = logits_of_rank(0, 1, cases, meta / "state.pt")
    assert torch.equal(alone[0], alone[1])
    assert not torch.allclose(alone[0], alone[2])
    assert not torch.allclose(alone[2], alone[3])
    for got in on_ranks(tmp_path_factory.mktemp("ranks") / "own", 2, logits_of_rank, cases, meta / "state.pt"):
        assert got.shape == alone.shape
        torch.testing.assert_close(got, alone, rtol=1e-4, atol=1e-4)
