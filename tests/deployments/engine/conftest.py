"""An executor without a model: the next token is a function of all tokens before it, read back through the blocks.

It writes each token into a cache of its own at the slot that the block table names, and answers
from what it reads there. So a wrong block, a stale one or one shared wrongly changes the output.
"""

from collections.abc import Callable

import numpy as np
import pytest

from cluster.channel import Address
from deployments.engine.request import EngineRequest, SamplingParams
from model.datatypes import PagedBatch
from model.sampling import RowLogprobs, SampledTokens, SamplingBatch

VOCAB = 1000


def next_token(context: list[int]) -> int:
    """What the fake model says after `context`; never below 10, so that tests have tokens to ban and stop at."""
    value = 7
    for token in context:
        value = (value * 31 + token + 1) % 1_000_003
    return 10 + value % (VOCAB - 10)


def completion(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class FakeExecutor:
    """`before`: called with each batch first; may raise."""

    def __init__(self, num_blocks: int, block_size: int, before: Callable[[PagedBatch], None] | None = None) -> None:
        self.num_blocks, self.block_size, self.before = num_blocks, block_size, before
        self.cache = np.full(num_blocks * block_size, -1, np.int64)
        self.num_steps = self.num_tokens = self.max_tokens = self.max_sequences = 0

    def step(self, batch: PagedBatch, sampling: SamplingBatch) -> SampledTokens:
        if self.before is not None:
            self.before(batch)
        self._count(batch)
        starts, ends = batch.query_starts.tolist(), batch.context_lens.tolist()
        says: dict[int, int] = {}
        for s, end in enumerate(ends):
            positions = np.arange(end)
            slots = batch.block_tables[s].numpy()[positions // self.block_size] * self.block_size
            slots = slots + positions % self.block_size
            first, last = starts[s], starts[s + 1]
            assert batch.positions[first:last].tolist() == list(range(end - (last - first), end))
            self.cache[slots[end - (last - first) :]] = batch.tokens[first:last].numpy()
            context = self.cache[slots].tolist()
            for row in range(first, last):
                if row in batch.logit_rows:
                    says[row] = next_token(context[: end - (last - 1 - row)])
        tokens = [says[row] for row in batch.logit_rows.tolist()]
        targets = [RowLogprobs(t, -1.0, 1, []) for t in sampling.targets]
        return SampledTokens(tokens[: sampling.num_samples], None, targets)

    def _count(self, batch: PagedBatch) -> None:
        counts = np.diff(batch.query_starts.numpy())
        assert (counts[: batch.num_decodes] == 1).all()
        assert (counts[batch.num_decodes :] > 1).all()
        self.num_steps += 1
        self.num_tokens += len(batch.tokens)
        self.max_tokens = max(self.max_tokens, len(batch.tokens))
        self.max_sequences = max(self.max_sequences, len(counts))


def make_request(
    name: str, prompt: list[int], max_tokens: int = 8, *, n: int = 1, to: Address | None = None, **params: object
) -> EngineRequest:
    address = to or Address("tcp://127.0.0.1:1", b"", "front")
    sampling = SamplingParams(max_tokens=max_tokens, **{"temperature": 0.0, **params})
    return EngineRequest(name, prompt, sampling, address, n)


@pytest.fixture(scope="session")
def request_of() -> Callable[..., EngineRequest]:
    return make_request


@pytest.fixture(scope="session")
def fake_executor() -> type[FakeExecutor]:
    return FakeExecutor


@pytest.fixture(scope="session")
def completion_of() -> Callable[[list[int], int], list[int]]:
    return completion
