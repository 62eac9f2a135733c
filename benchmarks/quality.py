"""Does serving lose quality? Our model, fp32 and bf16, beside transformers' fp32 on one real text.

Windows of a text are read by both from the same GGUF. Reported for each of ours: perplexity
and its difference to the reference in percent, and how often the likeliest next token is the
reference's. Exits with 1 when a perplexity is more than `--limit` percent off.

The model is used as the engine uses it: packed kernels and paged cache where there are any.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from benchmarks.prompts import real_text
from benchmarks.report import hardware
from cluster.shard import Shard
from model.datatypes import PagedBatch

GGUF = Path(__file__).parent.parent / "models/SmolLM2-135M-Instruct.Q4_1.gguf"
BLOCK_SIZE = 16
Logits = Callable[[Tensor], Tensor]
"""Token ids [length] to float logits [length, vocab_size]."""


@dataclass
class Tally:
    """Sums over the predictions of one model."""

    nll: float = 0.0
    agreed: int = 0
    predictions: int = 0

    def add(self, logits: Tensor, tokens: Tensor, reference_choice: Tensor) -> None:
        self.nll += F.cross_entropy(logits[:-1].float(), tokens[1:], reduction="sum").item()
        self.agreed += int((logits[:-1].argmax(-1) == reference_choice[:-1]).sum())
        self.predictions += len(tokens) - 1

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll / self.predictions)

    @property
    def agreement(self) -> float:
        return self.agreed / self.predictions


def shard_logits(dtype: str, window: int) -> Logits:
    shard = Shard(
        path=str(GGUF), dtype=dtype, block_size=BLOCK_SIZE, max_num_seqs=1, max_model_len=window, kv_cache_memory=2**28
    )
    blocks = torch.arange(-(-window // BLOCK_SIZE), dtype=torch.int32).view(1, 1, -1)

    def logits(tokens: Tensor) -> Tensor:
        length = len(tokens)
        return shard.logits(
            PagedBatch(
                tokens=tokens,
                positions=torch.arange(length),
                query_starts=torch.tensor([0, length], dtype=torch.int32),
                context_lens=torch.tensor([length], dtype=torch.int32),
                block_tables=blocks,
                logit_rows=torch.arange(length),
                num_decodes=0,
            )
        )

    return logits


def reference_logits() -> Logits:
    model = AutoModelForCausalLM.from_pretrained(
        GGUF.parent, gguf_file=GGUF.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    return lambda tokens: model(tokens.unsqueeze(0)).logits[0]


@torch.inference_mode()
def compare(models: dict[str, Logits], tokens: Tensor, window: int) -> dict[str, Tally]:
    """Tallies of `models`, the first of which is the reference, over whole windows of `tokens`."""
    tallies = {name: Tally() for name in models}
    for start in range(0, len(tokens) - window + 1, window):
        part = tokens[start : start + window]
        choice: Tensor | None = None
        for name, logits_of in models.items():
            logits = logits_of(part)
            choice = logits.argmax(-1) if choice is None else choice
            tallies[name].add(logits, part, choice)
    return tallies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=24 * 1024, help="length of the text")
    parser.add_argument("--window", type=int, default=1024, help="tokens read with a common context")
    parser.add_argument("--limit", type=float, default=1.0, help="largest difference of perplexity in percent")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(GGUF.parent, gguf_file=GGUF.name)
    tokens = torch.tensor(tokenizer.encode(real_text(), add_special_tokens=False)[: args.tokens])
    models = {"transformers fp32": reference_logits()}
    models |= {f"moray {dtype}": shard_logits(dtype, args.window) for dtype in ("float32", "bfloat16")}
    tallies = compare(models, tokens, args.window)

    reference = next(iter(tallies.values()))
    table = Table(title=f"{reference.predictions} predictions", title_justify="left")
    for heading in ("model", "perplexity", "difference %", "same choice %"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    figures = {}
    for name, tally in tallies.items():
        difference = 100 * (tally.perplexity / reference.perplexity - 1)
        table.add_row(name, f"{tally.perplexity:.4f}", f"{difference:+.4f}", f"{100 * tally.agreement:.2f}")
        figures[name] = {"perplexity": tally.perplexity, "difference_percent": difference, "agreement": tally.agreement}
    Console().print(table)
    print(json.dumps({"benchmark": "quality", "hardware": hardware(), "tokens": len(tokens), "models": figures}))
    sys.exit(any(abs(entry["difference_percent"]) > args.limit for entry in figures.values()))


if __name__ == "__main__":
    main()
