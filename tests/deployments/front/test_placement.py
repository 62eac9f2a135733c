"""Which replica a request goes to."""

from collections import Counter

import numpy as np

from deployments.engine.request import PromptImage
from deployments.front.placement import CHUNK, IMBALANCE_TOKENS, Candidate, PrefixMemory, choose, prefixes


def test_the_longest_prefix_wins_then_the_least_load():
    assert choose([Candidate("a", 64, 10), Candidate("b", 128, 500)], "r") == "b"
    assert choose([Candidate("a", 64, 10), Candidate("b", 64, 9)], "r") == "b"


def test_a_prefix_does_not_outweigh_a_great_imbalance():
    assert choose([Candidate("a", 0, 0), Candidate("b", 10_000, IMBALANCE_TOKENS)], "r") == "b"
    assert choose([Candidate("a", 0, 0), Candidate("b", 10_000, IMBALANCE_TOKENS + 1)], "r") == "a"


def test_equals_are_spread_and_the_order_of_candidates_does_not_matter():
    equal = [Candidate(name, 0, 0) for name in "abc"]
    chosen = [choose(equal, f"request-{number}") for number in range(300)]
    assert min(Counter(chosen)[name] for name in "abc") > 70
    assert chosen == [choose(equal[::-1], f"request-{number}") for number in range(300)]


def test_prefixes_are_remembered_by_replica_and_forgotten_when_there_are_too_many():
    memory = PrefixMemory(capacity=3)
    prompt = list(range(2 * CHUNK + 5))
    memory.add("a", prefixes(prompt))
    assert memory.num_cached("a", prefixes(prompt)) == 2 * CHUNK
    assert memory.num_cached("a", prefixes(prompt[:CHUNK] + [7] * CHUNK)) == CHUNK
    assert memory.num_cached("a", prefixes([7, *prompt])) == 0
    assert memory.num_cached("b", prefixes(prompt)) == 0
    memory.add("b", prefixes([1] * 3 * CHUNK))
    assert memory.num_cached("a", prefixes(prompt)) == 0


def test_other_images_are_other_prefixes():
    def image(digest: str) -> PromptImage:
        return PromptImage(np.zeros((1, 3, 2, 2), np.uint8), np.arange(3), digest)

    prompt = [1] * CHUNK
    assert prefixes(prompt, [image("x")]) == prefixes(prompt, [image("x")])
    assert prefixes(prompt, [image("x")]) != prefixes(prompt, [image("y")]) != prefixes(prompt)
