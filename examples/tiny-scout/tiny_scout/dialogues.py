"""What people ask about digits, and what the model learns to answer. Knows digits by their value only."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
)  # fmt: skip

READ = (
    "What digit is this?", "Which digit is this?", "What number is this?", "Which number do you see?",
    "What is this?", "What's this digit?", "Read this digit.", "Can you read this?", "What does it say?",
    "What do you see in this image?", "Tell me which digit is in the picture.", "Please read the handwritten number.",
    "Which number was written here?", "What is in this picture?", "Describe the image.", "Recognize the digit.",
)  # fmt: skip
READ_NEXT = ("And this?", "And this one?", "What about this one?", "Now this one.", "And what is this?", *READ[:6])
LIST = (
    "What digits are these?", "Which numbers do you see?", "Read these digits.", "What are these?", "List the digits.",
    "Tell me all the numbers.", "What is in these pictures?", "Can you read them all?",
)  # fmt: skip
SUM = (
    "What is their sum?", "What is the sum?", "Add these two numbers.", "Add them.", "What do they add up to?",
    "How much is that together?", "What is the sum of these digits?", "What are they together?",
    "What is the first plus the second?", "Please add up the two digits.", "Compute the sum of the two numbers.",
)  # fmt: skip
LARGER = (
    "Which of these is larger?", "Which one is larger?", "Which is the larger number?", "Which digit is bigger?",
    "Which of the two is greater?", "Which one is the biggest?", "Tell me the larger one.", "Is the first one larger?",
)  # fmt: skip
SMALLER = (
    "Which of these is smaller?", "Which one is smaller?", "Which is the smaller number?", "Which digit is less?",
    "Which of the two is the smallest?", "Tell me the smaller one.",
)  # fmt: skip
GREETINGS = (
    "Hello!", "Hi", "Hello, who are you?", "What can you do?", "Who are you?", "How can you help me?", "Good morning!",
    "What is the capital of France?", "Tell me a story.", "Help",
)  # fmt: skip
GREETING = "I read handwritten digits. Send me one or two pictures!"
OPENINGS = ("", "", "", "", "Hi! ", "Hello, ", "Please look. ", "Look at this: ")
SYSTEM = ("You are a helpful assistant.", "You are a helpful assistant that reads digits.", "Answer briefly.")

IMAGE = None
"""Stands for an image in a turn's parts."""


@dataclass(frozen=True)
class Turn:
    """parts: what the user says: texts, and IMAGE at the place of each image."""

    parts: tuple[str | None, ...]
    answer: str


@dataclass(frozen=True)
class Dialogue:
    """digits: of all images, in order."""

    turns: tuple[Turn, ...]
    digits: tuple[int, ...]
    system: str | None = None

    def messages(self, *, with_answers: bool) -> list[dict[str, object]]:
        """As the chat API takes them (images without their data); with_answers False leaves out the last answer."""
        messages: list[dict[str, object]] = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            parts = [{"type": "image"} if part is IMAGE else {"type": "text", "text": part} for part in turn.parts]
            messages += [{"role": "user", "content": parts}, {"role": "assistant", "content": turn.answer}]
        return messages if with_answers else messages[:-1]


def reading(digit: int) -> str:
    return f"This is {'an' if digit == 8 else 'a'} {WORDS[digit]}."


def listing(digits: Sequence[int]) -> str:
    *first, last = (WORDS[digit] for digit in digits)
    return f"{', '.join(first)} and {last}.".capitalize()


def addition(a: int, b: int) -> str:
    return f"{WORDS[a]} plus {WORDS[b]} is {WORDS[a + b]}.".capitalize()


def comparison(a: int, b: int, kind: str) -> str:
    """kind: "larger" or "smaller"."""
    if a == b:
        return f"Both are {WORDS[a]}."
    first, second = (max(a, b), min(a, b)) if kind == "larger" else (min(a, b), max(a, b))
    return f"{WORDS[first]} is {kind} than {WORDS[second]}.".capitalize()


def about_one(digit: int, question: str = READ[0]) -> Dialogue:
    return Dialogue((Turn((IMAGE, question), reading(digit)),), (digit,))


def about_two(a: int, b: int, question: str, answer: str) -> Dialogue:
    return Dialogue((Turn((IMAGE, IMAGE, question), answer),), (a, b))


def random_dialogue(digits: Sequence[int], rng: random.Random, *, only_one: bool = False) -> Dialogue:
    """One of all kinds, about as many of `digits` as it needs (three are enough)."""
    system = rng.choice(SYSTEM) if rng.random() < 0.15 else None
    kind = "one" if only_one else rng.choices(("one", "two", "list", "chat", "none"), (23, 44, 16, 14, 3))[0]
    if kind == "one":
        turns, used = [_asked(rng, READ, 1, reading(digits[0]))], 1
    elif kind == "two":
        turns, used = [_question_of_two(digits, rng, 2)], 2
    elif kind == "list":
        used = rng.choice((2, 2, 3))
        turns = [_asked(rng, LIST, used, listing(digits[:used]))]
    elif kind == "chat":
        turns = [_asked(rng, READ, 1, reading(digits[0])), _asked(rng, READ_NEXT, 1, reading(digits[1]))]
        used = 2
        if rng.random() < 0.6:
            turns.append(_question_of_two(digits, rng, 0))
    else:
        turns, used = [_asked(rng, GREETINGS, 0, GREETING)], 0
    return Dialogue(tuple(turns), tuple(digits[:used]), system)


def _question_of_two(digits: Sequence[int], rng: random.Random, num_images: int) -> Turn:
    a, b = digits[:2]
    kind = rng.choice(("sum", "sum", "larger", "smaller"))
    if kind == "sum":
        return _asked(rng, SUM, num_images, addition(a, b))
    return _asked(rng, LARGER if kind == "larger" else SMALLER, num_images, comparison(a, b, kind))


def _asked(rng: random.Random, questions: Sequence[str], num_images: int, answer: str) -> Turn:
    """The question in some wording, before or after the images."""
    question = rng.choice(OPENINGS) + rng.choice(questions)
    if rng.random() < 0.15:
        question = question.lower()
    if rng.random() < 0.1:
        question = question.rstrip("?.!")
    images = (IMAGE,) * num_images
    return Turn((question, *images) if rng.random() < 0.25 else (*images, question), answer)
