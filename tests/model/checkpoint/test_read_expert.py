"""One expert out of a checkpoint: the right values, and nothing else read."""

import json

import pytest
import torch

from model import LLM, TransformerInput
from model.checkpoint import CheckpointError, open_checkpoint
from model.checkpoint.slices import rank_region
from model.checkpoint.source import Mapped
from tests.model.old_names import NAMINGS


@pytest.fixture
def meta_folder(llama4_folder, tmp_path_factory):
    """The Llama 4 of `llama4_folder` in two files of Meta's, its experts flat."""
    folder = tmp_path_factory.mktemp("meta")
    checkpoint = open_checkpoint(llama4_folder)
    model = LLM(checkpoint.args, initialize=False)
    checkpoint.load_into(model)
    state = model.state_dict()
    for rank in range(2):
        part = {name: tensor[rank_region(name, tensor.shape, rank, 2)].clone() for name, tensor in state.items()}
        torch.save(NAMINGS["flat experts"](part), folder / f"consolidated.{rank:02d}.pth")
    (folder / "params.json").write_text(json.dumps(checkpoint.args.model_dump(mode="json")))
    return folder


@pytest.fixture
def num_read(monkeypatch):
    """How many elements were read from files, as a list of one."""
    count, read = [0], Mapped.read

    def counting(self, region):
        tensor = read(self, region)
        count[0] += tensor.numel()
        return tensor

    monkeypatch.setattr(Mapped, "read", counting)
    return count


FOLDERS = ["llama4_folder", "mixtral_folder", "meta_folder"]


@pytest.mark.parametrize("which", FOLDERS)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_an_expert_is_the_models_and_nothing_else_is_read(request, which, world_size, num_read):
    checkpoint = open_checkpoint(request.getfixturevalue(which))
    model = LLM(checkpoint.args, initialize=False)
    checkpoint.load_into(model)
    whole = model.layers[1].feed_forward.experts
    for expert in range(4):
        num_read[0] = 0
        ranks = [checkpoint.read_expert(1, expert, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert num_read[0] == 3 * 32 * 24
        assert torch.equal(torch.cat([rank.w1 for rank in ranks], 1), whole.w1[expert])
        assert torch.equal(torch.cat([rank.w2 for rank in ranks], 0), whole.w2[expert])
        assert torch.equal(torch.cat([rank.w3 for rank in ranks], 1), whole.w3[expert])
        assert all(tensor.is_contiguous() for rank in ranks for tensor in rank)


def test_experts_are_converted_and_do_not_alias_the_file(llama4_folder):
    checkpoint = open_checkpoint(llama4_folder)
    expert = checkpoint.read_expert(1, 2, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in expert} == {torch.bfloat16}
    kept = checkpoint.read_expert(1, 2)
    assert torch.equal(kept.w1.bfloat16(), expert.w1)
    kept.w1.zero_()
    assert checkpoint.read_expert(1, 2).w1.abs().sum() > 0


def test_opening_reads_no_weights(llama4_folder):
    """What is written to the file after it was opened is what a read returns."""
    checkpoint = open_checkpoint(llama4_folder)
    path = llama4_folder / "model.safetensors"
    header = int.from_bytes(path.read_bytes()[:8], "little") + 8
    with path.open("r+b") as file:
        file.seek(header)
        file.write(bytes(path.stat().st_size - header))
    assert checkpoint.read_expert(1, 0).w1.abs().sum() == 0


@pytest.mark.parametrize("which", FOLDERS)
def test_a_model_whose_experts_are_elsewhere_is_filled_without_them(request, which, num_read):
    checkpoint = open_checkpoint(request.getfixturevalue(which))
    model = LLM(checkpoint.args)

    class Elsewhere(torch.nn.Module):
        """No weights in the model: reads each expert when it is asked for."""

        is_whole = True

        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def submit(self, x_kD, experts_k, routed_k):
            self.rows = []
            for x, expert in zip(x_kD, experts_k.tolist(), strict=True):
                w1, w2, w3 = checkpoint.read_expert(self.layer, expert)
                self.rows.append((torch.nn.functional.silu(x @ w1) * (x @ w3)) @ w2)
            return self

        def wait(self):
            return torch.stack(self.rows)

    whole = LLM(checkpoint.args, initialize=False)
    checkpoint.load_into(whole)
    for layer, block in enumerate(model.layers):
        if checkpoint.args.is_moe_layer(layer):
            block.feed_forward.experts = Elsewhere(layer)
    with pytest.raises(CheckpointError, match=r"extra: .*experts\.w1"):
        checkpoint.load_into(model)
    num_read[0] = 0
    checkpoint.load_into(model, experts=False)
    assert num_read[0] == sum(parameter.numel() for parameter in model.parameters())
    inputs = TransformerInput(torch.arange(10)[None])
    torch.testing.assert_close(model(inputs).logits, whole(inputs).logits, rtol=1e-5, atol=1e-5)


def test_what_is_not_there_is_named(llama4_folder, tiny_llama, tmp_path_factory):
    checkpoint = open_checkpoint(llama4_folder)
    for layer in (0, -1, 2):
        with pytest.raises(CheckpointError, match=f"layer {layer} has no experts"):
            checkpoint.read_expert(layer, 0)
    with pytest.raises(CheckpointError, match="layer 1 has experts 0 to 3, not 4"):
        checkpoint.read_expert(1, 4)
    with pytest.raises(CheckpointError, match=r"size of 3 does not divide .*these sizes do: 1, 2, 4"):
        checkpoint.read_expert(1, 0, world_size=3)
    dense = tmp_path_factory.mktemp("dense")
    tiny_llama().save_pretrained(dense)
    with pytest.raises(CheckpointError, match="layer 0 has no experts"):
        open_checkpoint(dense).read_expert(0, 0)
    del checkpoint.sources["layers.1.feed_forward.experts.w2"]
    with pytest.raises(CheckpointError, match=r"experts\.w2 is missing"):
        checkpoint.read_expert(1, 0)
    checkpoint.sources["layers.1.feed_forward.experts.w1"] = Mapped(torch.zeros(4, 24, 32))
    with pytest.raises(CheckpointError, match=r"experts\.w1 is mis-shaped: \[4, 24, 32\], not \[4, 32, 24\]"):
        checkpoint.read_expert(1, 0)
