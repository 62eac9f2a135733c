import pytest
import torch

from model.checkpoint import CheckpointError, loading
from model.checkpoint.loading import load_parameters
from model.checkpoint.source import Mapped


def _sources(**extra):
    return {
        "norm.weight": Mapped(torch.randn(8)),
        "output.weight": Mapped(torch.randn(6, 8)),
        "layers.0.feed_forward.w2.weight": Mapped(torch.randn(8, 6)),
    } | extra


@pytest.mark.parametrize("piece_elements", [1, 7, 20, 1 << 20])
def test_every_element_arrives_whatever_the_size_of_a_piece(monkeypatch, piece_elements):
    monkeypatch.setattr(loading, "PIECE_ELEMENTS", piece_elements)
    sources = _sources(**{"layers.1.feed_forward.experts.w1": Mapped(torch.randn(3, 4, 5))})
    parameters = {name: torch.full(source.shape, torch.nan) for name, source in sources.items()}
    load_parameters(parameters, sources, "here")
    for name, source in sources.items():
        assert torch.equal(parameters[name], source.tensor)


def test_values_are_rounded_to_the_dtype_of_the_parameter_and_gradients_stay_possible():
    source = Mapped(torch.randn(8))
    parameter = torch.nn.Parameter(torch.empty(8, dtype=torch.bfloat16))
    load_parameters({"norm.weight": parameter}, {"norm.weight": source}, "here")
    assert torch.equal(parameter, source.tensor.bfloat16())
    assert parameter.requires_grad
    assert parameter.grad_fn is None


def test_missing_extra_and_misshaped_tensors_are_one_error_and_nothing_is_copied():
    sources = _sources(**{"blk.0.attn_q.bias": Mapped(torch.randn(8))})
    parameters = {
        "norm.weight": torch.zeros(8),
        "output.weight": torch.zeros(6, 4),
        "layers.0.feed_forward.w2.weight": torch.zeros(8),
        "tok_embeddings.weight": torch.zeros(6, 8),
    }
    with pytest.raises(CheckpointError) as raised:
        load_parameters(parameters, sources, "here")
    message = str(raised.value)
    assert "here does not fit" in message
    assert "1 missing: tok_embeddings.weight" in message
    assert "1 extra: blk.0.attn_q.bias" in message
    assert "2 mis-shaped: output.weight ([6, 8]; the model has [6, 4])" in message
    assert "layers.0.feed_forward.w2.weight ([8, 6]; the model has [8])" in message
    assert not parameters["norm.weight"].any()


def test_a_shape_that_fits_another_number_of_ranks_is_misshaped():
    source = {"output.weight": Mapped(torch.randn(6, 8))}
    with pytest.raises(CheckpointError, match=r"\[6, 8\], \[2, 8\] of it for each of 3 ranks; the model has \[3, 8\]"):
        load_parameters({"output.weight": torch.zeros(3, 8)}, source, "here", rank=0, world_size=3)


def test_long_lists_of_names_are_cut():
    parameters = {f"layers.{i}.ffn_norm.weight": torch.zeros(2) for i in range(100)}
    with pytest.raises(CheckpointError, match=r"100 missing: .* and 80 more$"):
        load_parameters(parameters, {}, "here")


def test_torch_keeps_its_number_of_threads_even_when_a_read_fails():
    class Broken:
        shape = (8,)

        def read(self, region):
            assert torch.get_num_threads() == 1
            raise OSError("disk gone")

    torch.set_num_threads(2)
    with pytest.raises(OSError, match="disk gone"):
        load_parameters({"norm.weight": torch.zeros(8)}, {"norm.weight": Broken()}, "here")
    assert torch.get_num_threads() == 2


def test_a_rank_reads_its_slice_and_no_more(monkeypatch):
    monkeypatch.setattr(loading, "PIECE_ELEMENTS", 10)
    whole, read = torch.randn(6, 8), []

    class Recorded(Mapped):
        def read(self, region):
            read.append(region)
            return super().read(region)

    name = "layers.0.feed_forward.w2.weight"
    parameter = torch.zeros(6, 4)
    load_parameters({name: parameter}, {name: Recorded(whole)}, "here", rank=1, world_size=2)
    assert read == [(slice(start, start + 2), slice(4, 8)) for start in (0, 2, 4)]
    assert torch.equal(parameter, whole[:, 4:])
