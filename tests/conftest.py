"""Real stacks for tests."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.stack import Stack, serve_yaml


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
