import pytest

from model.stage import WHOLE, Stage


@pytest.mark.parametrize(("n_layers", "count"), [(4, 2), (5, 2), (30, 4), (3, 3), (7, 1)])
def test_layers_are_cut_evenly_and_each_has_one_owner(n_layers: int, count: int) -> None:
    stages = [Stage(index, count) for index in range(count)]
    layers = [list(stage.layers(n_layers)) for stage in stages]
    assert [layer for part in layers for layer in part] == list(range(n_layers))
    sizes = [len(part) for part in layers]
    assert max(sizes) - min(sizes) <= 1
    for layer in range(n_layers):
        owners = [stage.owns(f"layers.{layer}.attention.wq.weight", n_layers) for stage in stages]
        assert owners.count(True) == 1
        assert layer in layers[owners.index(True)]


def test_what_is_no_layer_is_the_first_stages() -> None:
    for name in ("tok_embeddings.weight", "norm.weight", "vision_encoder.layers.3.weight"):
        assert [Stage(index, 2).owns(name, 4) for index in range(2)] == [True, False]
    assert WHOLE.owns("layers.3.wq", 4)


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="4 pipeline stages cannot share 3 layers"):
        Stage(0, 4).layers(3)
