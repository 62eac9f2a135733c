"""Hugging Face transformers on the weights we serve, read from the same GGUF by transformers' own loader."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

GGUF = Path(__file__).parents[2] / "models/SmolLM2-135M-Instruct.Q4_1.gguf"
OUTPUT_TOKENS = 64
LENGTHS = (5, 24, 60, 150)
"""Prompt lengths in tokens. Few of them, so that the reference can run equal prompts as one batch without padding."""

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


@dataclass(frozen=True)
class Continuation:
    """A prompt, its token ids, and what the reference says after it, greedily."""

    prompt: str
    prompt_ids: list[int]
    output_ids: list[int]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(GGUF.parent, gguf_file=GGUF.name)


@pytest.fixture(scope="session")
def reference() -> Iterator[Any]:
    """`LlamaForCausalLM`, fp32, weights dequantized, on both threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(
        GGUF.parent, gguf_file=GGUF.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    yield model.eval()
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def prompts(tokenizer: Any) -> list[str]:
    """32 different prompts: prose, code, data, other languages, in several lengths."""
    texts = list(topics.topics.values())
    found = []
    for length in LENGTHS:
        for number, opening in enumerate(OPENINGS):
            padded = opening if length <= 24 else texts[number * 7 + length % 5] + "\n\n" + opening
            ids = tokenizer.encode(padded, add_special_tokens=False)
            found.append(tokenizer.decode(ids[-length:] if length > 24 else ids[:length]))
    assert len(set(found)) == 32
    return found


@pytest.fixture(scope="session")
def continuations(reference: Any, tokenizer: Any, prompts: list[str]) -> list[Continuation]:
    """Greedy continuations of `OUTPUT_TOKENS` tokens, past any end of sequence, from `generate` in batches."""
    by_length = defaultdict(list)
    for prompt in prompts:
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        by_length[len(ids)].append((prompt, ids))
    found: dict[str, Continuation] = {}
    for group in by_length.values():
        outputs = _generate(reference, torch.tensor([ids for _, ids in group]))
        for (prompt, ids), output in zip(group, outputs, strict=True):
            found[prompt] = Continuation(prompt, ids, output)
    return [found[prompt] for prompt in prompts]


def _generate(reference: Any, tokens: torch.Tensor) -> list[list[int]]:
    output = reference.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=OUTPUT_TOKENS,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
    )
    return output[:, tokens.shape[1] :].tolist()


@pytest.fixture(scope="session")
def fp32_stack(start_stack: Callable[[dict[str, Any]], str]) -> str:
    """Base URL of a stack that serves the same file in fp32."""
    engine = {"dtype": "float32", "max_model_len": 2048, "kv_cache_memory": "512MiB"}
    return start_stack({"models": [{"id": "smollm2", "path": str(GGUF), "engine": engine}]})
