"""An executor without a model: the next token is a function of all tokens before it, read back through the blocks.

It writes each token into a cache of its own at the slot that the block table names, and answers
from what it reads there. So a wrong block, a stale one or one shared wrongly changes the output.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch

from cluster.channel import Address, Inbox
from deployments.config import ModelConfig
from deployments.engine.deployment import Engine
from deployments.engine.request import EngineRequest, PromptImage, SamplingParams, StepMessage, TokenDelta
from model.args import Size, VisionArgs
from model.datatypes import PagedBatch
from model.sampling import RowLogprobs, SampledTokens, SamplingBatch

VOCAB = 1000
PERIOD = 1_000_000
"""A token in the cache of group g is stored as itself and g times this, so that groups cannot read each other's."""
PATCHES = 2
"""Of a tile."""
VISION = VisionArgs(
    image_size=Size(height=4, width=4), patch_size=Size(height=4, width=2), dim=8, n_layers=1, n_heads=1,
    mlp_ratio=1.0, output_dim=8, pixel_shuffle_ratio=1.0,
)  # fmt: skip
assert VISION.tokens_per_tile == PATCHES


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


def seen(tiles: np.ndarray) -> list[int]:
    """What the fake model sees of an image: two numbers for each tile stand where its patch tokens are."""
    return [VOCAB + 10 * int(tile.sum()) + patch for tile in tiles for patch in range(PATCHES)]


class FakeExecutor:
    """`before`: called with each batch first; may raise.

    chunks: of each KV group, as in `Limits.kv_chunks`. Every group's tokens are read back where a query would see
    them, from the beginning of its chunk on, and must be those that were written.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        before: Callable[[PagedBatch], None] | None = None,
        chunks: tuple[int | None, ...] = (None,),
    ) -> None:
        self.num_blocks, self.block_size, self.before = num_blocks, block_size, before
        self.kv_chunks, self.num_kv_tokens = chunks, num_blocks // len(chunks) * block_size
        self.cache = np.full(num_blocks * block_size, -1, np.int64)
        self.num_encoded = self.num_probes = 0
        self.probe_fault: Exception | None = None
        self.num_steps = self.num_tokens = self.max_tokens = self.max_sequences = 0

    def step(self, batch: PagedBatch, sampling: SamplingBatch) -> SampledTokens:
        if self.before is not None:
            self.before(batch)
        self._count(batch)
        tokens = batch.tokens.numpy().copy()
        if batch.image_rows is not None:
            tokens[batch.image_rows.numpy()] = batch.image_embeddings[:, 0].numpy()
        starts, ends = batch.query_starts.tolist(), batch.context_lens.tolist()
        for s, end in enumerate(ends):
            first, last = starts[s], starts[s + 1]
            assert batch.positions[first:last].tolist() == list(range(end - (last - first), end))
            for group in range(len(self.kv_chunks)):
                slots = self._slots(batch, group, s, end - (last - first), end)
                self.cache[slots] = PERIOD * group + tokens[first:last]
        says: dict[int, int] = {}
        for s, end in enumerate(ends):
            begun = end - (starts[s + 1] - starts[s])
            seen_by_group = [
                self._seen(batch, group, s, begun // chunk * chunk if chunk else 0, end)
                for group, chunk in enumerate(self.kv_chunks)
            ]
            context = seen_by_group[0]
            for part in seen_by_group:
                assert part == context[len(context) - len(part) :]
            for row in range(starts[s], starts[s + 1]):
                if row in batch.logit_rows:
                    says[row] = next_token(context[: end - (starts[s + 1] - 1 - row)])
        said = [says[row] for row in batch.logit_rows.tolist()]
        targets = [RowLogprobs(t, -1.0, 1, []) for t in sampling.targets]
        return SampledTokens(said[: sampling.num_samples], None, targets)

    def _seen(self, batch: PagedBatch, group: int, sequence: int, first: int, end: int) -> list[int]:
        return (self.cache[self._slots(batch, group, sequence, first, end)] - PERIOD * group).tolist()

    def _slots(self, batch: PagedBatch, group: int, sequence: int, first: int, end: int) -> np.ndarray:
        positions = np.arange(first, end)
        blocks = batch.block_tables[group, sequence].numpy()[positions // self.block_size]
        return blocks * self.block_size + positions % self.block_size

    def encode_image(self, tiles: np.ndarray) -> torch.Tensor:
        self.num_encoded += 1
        return torch.tensor(seen(tiles))[:, None]

    def probe(self) -> None:
        self.num_probes += 1
        if self.probe_fault is not None:
            raise self.probe_fault

    def _count(self, batch: PagedBatch) -> None:
        counts = np.diff(batch.query_starts.numpy())
        assert (counts[: batch.num_decodes] == 1).all()
        assert (counts[batch.num_decodes :] > 1).all()
        self.num_steps += 1
        self.num_tokens += len(batch.tokens)
        self.max_tokens = max(self.max_tokens, len(batch.tokens))
        self.max_sequences = max(self.max_sequences, len(counts))


def make_request(
    name: str,
    prompt: list[int],
    max_tokens: int = 8,
    *,
    n: int = 1,
    to: Address | None = None,
    images: tuple[PromptImage, ...] = (),
    **params: object,
) -> EngineRequest:
    address = to or Address("tcp://127.0.0.1:1", b"", "front")
    sampling = SamplingParams(max_tokens=max_tokens, **{"temperature": 0.0, **params})
    return EngineRequest(name, prompt, sampling, address, n, images)


@pytest.fixture(scope="session")
def request_of() -> Callable[..., EngineRequest]:
    return make_request


@pytest.fixture(scope="session")
def fake_executor() -> type[FakeExecutor]:
    return FakeExecutor


@pytest.fixture(scope="session")
def completion_of() -> Callable[[list[int], int], list[int]]:
    return completion


@dataclass
class Front:
    """An engine around a fake executor, and an inbox that sorts what it sends."""

    engine: Engine
    inbox: Inbox
    executor: object
    outputs: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    last: dict[tuple[str, int], TokenDelta] = field(default_factory=dict)
    cached: dict[tuple[str, int], int] = field(default_factory=dict)
    messages: int = 0
    beats: int = 0
    engine_id: str = ""

    async def listen(self) -> None:
        while True:
            message = msgspec.msgpack.decode(await self.inbox.receive(), type=StepMessage)
            self.messages += bool(message.deltas)
            self.beats += not message.deltas
            self.engine_id = message.engine
            for delta in message.deltas:
                key = (delta.request_id, delta.index)
                tokens = self.outputs.setdefault(key, [])
                assert delta.offset == len(tokens)
                tokens += delta.token_ids
                self.cached.setdefault(key, delta.num_cached_tokens)
                self.last[key] = delta

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.005)

    @property
    def pool(self) -> object:
        return self.engine._loop._scheduler.pool


@pytest.fixture
async def start(fake_executor: type):
    started = []

    def _start(num_blocks: int = 250, before: Callable | None = None, **config: object) -> Front:
        executor = fake_executor(num_blocks, 16, before)
        executor.max_model_len, executor.args = 2048, SimpleNamespace(vocab_size=VOCAB, vision_args=VISION)
        engine = Engine(ModelConfig(id="fake", path="none", engine=config), shard=executor)
        front = Front(engine, Inbox("127.0.0.1"), executor)
        started.append((front, asyncio.create_task(front.listen())))
        return front

    yield _start
    for front, listening in started:
        await asyncio.to_thread(front.engine.stop)
        listening.cancel()
        front.inbox.close()
