"""Writes a GGUF file as a Hugging Face folder, so that peers serve the weights that we serve.

Reads it with transformers' own GGUF loader: nothing of ours is on this path, so a folder
that speaks like our server is evidence for both.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def export(gguf: Path, folder: Path, dtype: torch.dtype) -> None:
    """Dequantizes `gguf` to `dtype` and writes weights, configuration, tokenizer and chat template."""
    location = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **location, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(**location)
    if not tokenizer.chat_template:
        raise ValueError(f"{gguf} brought no chat template")
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    export(args.gguf, args.folder, getattr(torch, args.dtype))


if __name__ == "__main__":
    main()
