"""Which engine replica a request goes to: pure functions, and what a front remembers to decide by.

An engine keeps the keys and values of what it computed last, so a prompt is cheapest where its
beginning was computed before. A front knows where it sent what; it need not ask.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from deployments.engine.request import EngineRequest, PromptImage

CHUNK = 64
"""Tokens of a prompt that are remembered as one."""

REMEMBERED_CHUNKS = 100_000

IMBALANCE_TOKENS = 4096
"""A replica with so many more outstanding tokens than the least loaded gets nothing, whatever it has cached."""

EXPECTED_OUTPUT = 256
"""Output tokens that count as outstanding, of requests that allow more: few use all that they may."""


@dataclass(frozen=True)
class Candidate:
    """A replica that would take the request. cached: tokens of the prompt that it probably has keys and values of.
    outstanding: tokens that it has still to compute for this front's requests, an estimate."""

    replica: str
    cached: int
    outstanding: int


def choose(candidates: Sequence[Candidate], request_id: str) -> str:
    """The longest cached prefix, then the least outstanding tokens; equals are spread by `request_id`."""
    bound = min(candidate.outstanding for candidate in candidates) + IMBALANCE_TOKENS
    fair = [candidate for candidate in candidates if candidate.outstanding <= bound]
    return min(fair, key=lambda c: (-c.cached, c.outstanding, _lot(c.replica, request_id))).replica


def _lot(replica: str, request_id: str) -> int:
    return int.from_bytes(blake2b(f"{replica} {request_id}".encode(), digest_size=4).digest())


def work(request: EngineRequest) -> int:
    """Tokens that an engine computes for the request at most, or expects to."""
    return len(request.prompt) + request.n * min(request.sampling.max_tokens, EXPECTED_OUTPUT)


def prefixes(prompt: Sequence[int], images: Sequence[PromptImage] = ()) -> list[int]:
    """Names of the prompt's beginnings of 1, 2, … whole chunks; equal names mean equal beginnings, all but surely."""
    name = hash(tuple(image.digest for image in images))
    names = []
    for end in range(CHUNK, len(prompt) + 1, CHUNK):
        name = hash((name, *prompt[end - CHUNK : end]))
        names.append(name)
    return names


class PrefixMemory:
    """Which beginnings of prompts were sent to which replica lately."""

    def __init__(self, capacity: int = REMEMBERED_CHUNKS) -> None:
        self._capacity = capacity
        self._sent: OrderedDict[tuple[str, int], None] = OrderedDict()

    def add(self, replica: str, names: Sequence[int]) -> None:
        for name in names:
            self._sent[replica, name] = None
            self._sent.move_to_end((replica, name))
        while len(self._sent) > self._capacity:
            self._sent.popitem(last=False)

    def num_cached(self, replica: str, names: Sequence[int]) -> int:
        """Tokens at the beginning of a prompt, given its `prefixes`."""
        known = 0
        for name in names:
            if (replica, name) not in self._sent:
                break
            known += 1
        return known * CHUNK
