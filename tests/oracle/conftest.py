"""Prompts for the comparison with Hugging Face transformers, and the stack that is compared."""

from collections.abc import Callable
from pydoc_data import topics
from typing import Any

import pytest

from deployments.front.tokenizer import open_tokenizer
from tests.e2e.conftest import GGUF, application

LENGTHS = (5, 24, 60, 150)
"""Of prompts, in tokens."""

OPENINGS = (
    "The capital of France is Paris, and the capital of Japan is Tokyo. The capital of Italy",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Once upon a time in a small village by the sea there lived an old fisherman who",
    '{"name": "Ada", "born": 1815, "field": "mathematics", "known_for": [',
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich, und dann",
    "1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144,",
    "Q: Why is the sky blue?\nA: Because 🌍 sunlight is scattered by the air",
    "SELECT name, COUNT(*) FROM orders WHERE year = 2023 GROUP BY",
)


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    pass


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Tokens of 32 different prompts: prose, code, data, other languages, in several lengths."""
    tokenizer = open_tokenizer(str(GGUF))
    texts = list(topics.topics.values())
    found = []
    for length in LENGTHS:
        for number, opening in enumerate(OPENINGS):
            padded = opening if length <= 24 else texts[number * 7 + length % 5] + "\n\n" + opening
            ids = tokenizer.encode(padded, add_special_tokens=False)
            found.append(ids[-length:] if length > 24 else ids[:length])
    assert len(set(map(tuple, found))) == 32
    return found


@pytest.fixture(scope="session")
def fp32_stack(start_stack: Callable[[dict[str, Any]], str]) -> str:
    """Base URL of a stack that serves the same file in fp32: the one that tests/e2e asks for."""
    return start_stack(application())
