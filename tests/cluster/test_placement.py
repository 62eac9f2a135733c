from cluster.placement import misfit


def test_bundles_that_fit_together_pass() -> None:
    assert misfit([{"CPU": 1}] * 4, {"a": {"CPU": 2, "memory": 1}, "b": {"CPU": 2}}) is None
    assert misfit([], {}) is None


def test_each_node_is_filled_before_the_next() -> None:
    """Otherwise the last bundle would find its node taken in part."""
    assert misfit([{"CPU": 2}, {"CPU": 2}, {"CPU": 4}], {"big": {"CPU": 4}, "small": {"CPU": 4}}) is None


def test_the_message_names_the_bundle_and_what_is_left() -> None:
    said = misfit([{"CPU": 1, "GPU": 1}] * 3, {"node a": {"CPU": 8, "GPU": 2}, "node b": {"CPU": 4}})
    assert said == (
        "bundle 2 of 3 (CPU 1, GPU 1) fits on no node beside the 2 before it. "
        "Left there: node a CPU 6, GPU 0; node b CPU 4, GPU 0"
    )
    assert misfit([{"CPU": 1}], {}) == "bundle 0 of 1 (CPU 1) fits on no node. Left there: no node at all"
