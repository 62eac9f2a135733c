"""Answers by prefill and cached decode, greedily: the reference way to use `LLM`, many conversations at once."""

from collections.abc import Sequence
from pathlib import Path

import torch

from deployments.front.tokenizer import open_tokenizer
from model import LLM, TransformerInput
from model.checkpoint import open_checkpoint
from tiny_scout.conversation import Batch, ChatFormat, Conversation, model_input

MAX_TOKENS = 24


@torch.no_grad()
def answers(model: LLM, chat: ChatFormat, prompts: Sequence[Conversation]) -> list[str]:
    """One for each prompt. As many as the model's `max_batch_size` are computed together."""
    size, texts = model.args.max_batch_size, list[str]()
    for start in range(0, len(prompts), size):
        batch = Batch.of(prompts[start : start + size], chat.image_tokens.patch)
        texts += [chat.tokenizer.decode(ids) for ids in _decode(model, batch, chat.end)]
    return texts


def _decode(model: LLM, batch: Batch, end: int) -> list[list[int]]:
    """Padding stands after a prompt, where no token of the prompt sees it and answers write over it."""
    rows, positions = torch.arange(len(batch.lengths)), batch.lengths
    logits = model(model_input(model, batch), inference=True).logits
    tokens = logits[rows, positions - 1].argmax(dim=-1)
    chosen = [tokens]
    while len(chosen) < MAX_TOKENS and not all((torch.stack(chosen) == end).any(dim=0)):
        logits = model(TransformerInput(tokens[:, None], positions), inference=True).logits
        tokens, positions = logits[:, -1].argmax(dim=-1), positions + 1
        chosen.append(tokens)
    by_row = torch.stack(chosen, dim=1).tolist()
    return [ids[: ids.index(end)] if end in ids else ids for ids in by_row]


def load(folder: Path, batch_size: int = 64, length: int = 512) -> tuple[LLM, ChatFormat]:
    """A checkpoint in float32, with a cache for `batch_size` conversations of `length` tokens."""
    checkpoint = open_checkpoint(folder)
    args = checkpoint.args.model_copy(update={"max_batch_size": batch_size, "max_seq_len": length})
    if args.vision_args is None:
        raise ValueError(f"{folder}: the model sees no images")
    model = LLM(args, initialize=False)
    checkpoint.load_into(model)
    return model, ChatFormat(open_tokenizer(str(folder)), args.vision_args.tokens_per_tile)
