"""Writes a Llama of random weights as a Hugging Face folder, for what SmolLM2's 9 heads do not divide by.

The tokenizer is SmolLM2's, so that prompts have the lengths that are asked for.
"""

import argparse
import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def write(folder: Path, tokenizer: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=768, intermediate_size=2048, num_hidden_layers=24, num_attention_heads=12,
        num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer / file, folder / file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a Hugging Face folder")
    args = parser.parse_args()
    write(args.folder, args.tokenizer)


if __name__ == "__main__":
    main()
