"""How well a model reads digits that it has never seen, sent as PNG files."""

import random
from collections.abc import Callable, Sequence

from deployments.front.images.prepare import prepare_bytes
from model import LLM
from tiny_scout import dialogues, digits
from tiny_scout.answering import answers
from tiny_scout.conversation import ChatFormat, image_settings
from tiny_scout.dialogues import LARGER, READ, SUM, Dialogue

Exam = list[tuple[Dialogue, list[int]]]
"""Dialogues and the digits (indices) they are about."""


def singles(indices: Sequence[int]) -> Exam:
    """Every digit once."""
    return [(dialogues.about_one(_value(i), READ[n % len(READ)]), [i]) for n, i in enumerate(indices)]


def sums(indices: Sequence[int], seed: int = 0) -> Exam:
    """Pairs of digits, each digit in two of them."""

    def ask(a: int, b: int, n: int) -> Dialogue:
        return dialogues.about_two(a, b, SUM[n % len(SUM)], dialogues.addition(a, b))

    return _pairs(indices, seed, ask)


def comparisons(indices: Sequence[int], seed: int = 0) -> Exam:
    """Pairs of digits, each digit in two of them."""

    def ask(a: int, b: int, n: int) -> Dialogue:
        return dialogues.about_two(a, b, LARGER[n % len(LARGER)], dialogues.comparison(a, b, "larger"))

    return _pairs(indices, seed, ask)


def accuracy(model: LLM, chat: ChatFormat, exam: Exam) -> float:
    """The share of dialogues that the model answers word for word."""
    settings = image_settings(model)
    prompts = [
        chat.conversation(dialogue, [prepare_bytes(digits.png(i), settings) for i in indices], with_answers=False)
        for dialogue, indices in exam
    ]
    given = answers(model, chat, prompts)
    return sum(text == dialogue.turns[-1].answer for text, (dialogue, _) in zip(given, exam, strict=True)) / len(exam)


def _pairs(indices: Sequence[int], seed: int, ask: Callable[[int, int, int], Dialogue]) -> Exam:
    shuffled = random.Random(seed).sample(list(indices), len(indices))
    rotated = shuffled[1:] + shuffled[:1]
    return [(ask(_value(a), _value(b), n), [a, b]) for n, (a, b) in enumerate(zip(shuffled, rotated, strict=True))]


def _value(index: int) -> int:
    return int(digits.LABELS[index])
