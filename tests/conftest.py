"""Real stacks for tests, and the reference that several compare with: each is started, or loaded, once."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.stack import ROOT, Stack, serve_yaml


@pytest.fixture(scope="session")
def start_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[dict[str, Any]], str]]:
    """Starts an application from a Serve YAML's `args`, and gives its base URL. One runs at a time: asking for
    other `args` stops the one before; asking for the same again gives the one that runs.
    """
    running: list[tuple[dict[str, Any], Stack]] = []

    def start(args: dict[str, Any]) -> str:
        if running and running[0][0] == args:
            return running[0][1].url
        while running:
            running.pop()[1].stop()
        stack = Stack(tmp_path_factory.mktemp("stack"), serve_yaml(args))
        stack.start()
        running.append((args, stack))
        return stack.url

    yield start
    while running:
        running.pop()[1].stop()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Of torch: two wait for each other at every product, for long where anything else runs."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def transformers_smollm2() -> Any:
    """The quickstart's model as transformers reads it from the same GGUF, in fp32. Half a minute on a busy machine."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    gguf = ROOT / "models/SmolLM2-135M-Instruct.Q4_1.gguf"
    if not gguf.is_file():
        pytest.skip(f"{gguf} is not there: `make test` fetches it")
    settings = GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=settings
    ).eval()
