"""Trains tiny-scout, saves it as a checkpoint, and examines it on digits that it has not seen.

.venv/bin/python examples/tiny-scout/train.py
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from tiny_scout import digits
from tiny_scout.architecture import tiny_scout
from tiny_scout.checkpoint import save
from tiny_scout.conversation import ChatFormat
from tiny_scout.encoder import train_encoder
from tiny_scout.experts import initialize_experts
from tiny_scout.report import print_report
from tiny_scout.training import Settings, train
from tiny_scout.vocabulary import train_tokenizer

from deployments.front.tokenizer import open_tokenizer
from model import LLM

OUT = Path(__file__).with_name("checkpoint")


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    console = Console()
    arguments.out.mkdir(parents=True, exist_ok=True)
    train_tokenizer(arguments.out)
    tokenizer = open_tokenizer(str(arguments.out))
    model = LLM(tiny_scout(tokenizer.vocab_size))
    initialize_experts(model)
    assert model.args.vision_args is not None
    chat = ChatFormat(tokenizer, model.args.vision_args.tokens_per_tile)
    console.print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(digits.TRAIN)} digits to learn from"
    )
    train_encoder(model, console, arguments.seed)
    train(model, chat, replace(Settings(), steps=arguments.steps), console, arguments.seed)
    save(model, arguments.out, chat.image_tokens.patch)
    console.print(f"saved to {arguments.out}")
    print_report(arguments.out, console)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the checkpoint (%(default)s)")
    parser.add_argument("--steps", type=int, default=Settings().steps, help="of the whole model (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (%(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
