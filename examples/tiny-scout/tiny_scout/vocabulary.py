"""Trains the tokenizer: SentencePiece over the dialogues, with the special tokens of Llama 4's chat format."""

import io
import json
import random
import shutil
import string
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from tiny_scout.dialogues import GREETINGS, SYSTEM, WORDS, random_dialogue

SIZE = 512
BEGIN, END, EOM, EOT, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|eom|>", "<|eot|>", "<|finetune_right_pad|>"
CONTROL = (
    "<|header_start|>", "<|header_end|>", EOM, EOT, "<|image_start|>", "<|image_end|>", "<|tile_x_separator|>",
    "<|tile_y_separator|>", "<|image|>", "<|patch|>",
)  # fmt: skip
TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def train_tokenizer(folder: Path) -> None:
    """Writes the tokenizer and what belongs to it: its settings, the chat template, which tokens end an answer."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_sentences(),
        model_writer=model,
        model_type="bpe",
        vocab_size=SIZE,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        byte_fallback=True,
        character_coverage=1.0,
        control_symbols=list(CONTROL),
        user_defined_symbols=["\n\n"],
        unk_id=0, bos_id=1, eos_id=2, pad_id=3, bos_piece=BEGIN, eos_piece=END, pad_piece=PAD,
        num_threads=1,
        minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    write_json(folder / "tokenizer_config.json", {"bos_token": BEGIN, "eos_token": EOT, "pad_token": PAD})
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ends = [processor.piece_to_id(token) for token in (EOT, EOM, END)]
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": ends, "do_sample": False})
    shutil.copy(TEMPLATE, folder / TEMPLATE.name)


def write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _sentences() -> Iterator[str]:
    yield from string.printable.split()
    rng = random.Random(0)
    for _ in range(4000):
        dialogue = random_dialogue([rng.randrange(10) for _ in range(3)], rng)
        for turn in dialogue.turns:
            yield from (part for part in turn.parts if part)
            yield turn.answer
    yield from 20 * (*GREETINGS, *SYSTEM, *WORDS, "user", "assistant", "system")
