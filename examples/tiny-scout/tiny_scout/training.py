"""The second stage: the whole model learns to answer, through `LLM.forward` and plain autograd."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from deployments.front.images import ImageSettings
from deployments.front.images.tiles import cut
from model import LLM
from tiny_scout import digits
from tiny_scout.conversation import NO_LABEL, Batch, ChatFormat, Conversation, image_settings, model_input
from tiny_scout.dialogues import random_dialogue
from tiny_scout.experts import imbalance, moe_layers, router_scores
from tiny_scout.optimization import Optimizer, ProgressBar

POOL = 8
"""Batches whose dialogues are made together."""


@dataclass(frozen=True)
class Settings:
    """only_one: so many of the first steps show dialogues about one digit only.
    balance: weight of the load-balancing loss.
    """

    steps: int = 3000
    batch_size: int = 32
    learning_rate: float = 2e-3
    only_one: int = 160
    balance: float = 0.02


def train(model: LLM, chat: ChatFormat, settings: Settings, console: Console, seed: int) -> None:
    """Shows loss, the share of answer tokens predicted right, and the balance of the experts (1 is even).

    Shared experts learn slowly. At the rate of the others they learn everything, since all tokens train them,
    and shuffled experts are hardly noticed.
    """
    shared = [p for moe in moe_layers(model) if moe.shared_expert for p in moe.shared_expert.parameters()]
    optimizer = Optimizer(model.parameters(), settings.learning_rate, settings.steps, slow=shared)
    batches = training_batches(model, chat, settings, seed)
    with ProgressBar("whole model", settings.steps, console) as progress:
        for _ in range(settings.steps):
            loss, right, balance = losses(model, next(batches))
            optimizer.step(loss + settings.balance * balance)
            progress.advance(loss=loss.detach(), right=right, balance=balance.detach())


def losses(model: LLM, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of the answers' tokens, the share predicted right, and the imbalance of the experts."""
    with router_scores(model) as scores:
        logits = model(model_input(model, batch)).logits[:, :-1]
    labels = batch.labels[:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=NO_LABEL)
    learned = labels != NO_LABEL
    right = (logits.argmax(dim=-1) == labels)[learned].float().mean()
    is_token = (torch.arange(batch.tokens.shape[1]) < batch.lengths[:, None]).flatten()
    return loss, right, torch.stack([imbalance(layer[is_token]) for layer in scores]).mean()


def training_batches(model: LLM, chat: ChatFormat, settings: Settings, seed: int) -> Iterator[Batch]:
    """Without end: new dialogues about new variations of the digits of the training split.

    Dialogues of about one length make a batch, so that little of it is padding.
    """
    rng, step, images = random.Random(seed), 0, image_settings(model)
    while True:
        pool = [_conversation(chat, images, rng, step < settings.only_one) for _ in range(POOL * settings.batch_size)]
        pool.sort(key=lambda conversation: len(conversation.ids))
        starts = range(0, len(pool), settings.batch_size)
        for start in rng.sample(starts, POOL):
            yield Batch.of(pool[start : start + settings.batch_size], chat.image_tokens.patch)
        step += POOL


def _conversation(chat: ChatFormat, images: ImageSettings, rng: random.Random, only_one: bool) -> Conversation:
    chosen: Sequence[int] = rng.choices(digits.TRAIN.tolist(), k=3)
    dialogue = random_dialogue([int(digits.LABELS[i]) for i in chosen], rng, only_one=only_one)
    shown = chosen[: len(dialogue.digits)]
    return chat.conversation(dialogue, [cut(digits.varied_picture(i, rng), images) for i in shown])
