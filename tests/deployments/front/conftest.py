"""A front over a deterministic fake engine, driven in process."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import httpx
import pytest
from PIL import ImageFile

from deployments.config import FrontConfig
from deployments.engine.request import PromptImage, SamplingParams, TokenDelta, TokenLogprobs
from deployments.front.api import build_api
from deployments.front.chat_template import ChatTemplate
from deployments.front.metrics import FrontMetrics
from deployments.front.served_model import ServedModel
from deployments.front.tokenizer import Tokenizer, Vocabulary
from deployments.metrics import render, snapshot
from deployments.status import ClusterStatus, FrontStatus

EOS = 256
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class ByteTokenizer(Tokenizer):
    """A token is a byte; 256 ends an answer."""

    def __init__(self) -> None:
        pieces = [bytes([i]) for i in range(256)] + [b"<eos>"]
        super().__init__(Vocabulary(pieces, frozenset([EOS]), None, (EOS,)))

    def _encode(self, text: str, add_special_tokens: bool, parse_special: bool) -> list[int]:
        return list(text.encode())


@dataclass
class FakeEngine:
    """Answers every choice `i` with `answers[i]` (the last one for all beyond), a token at a time.

    refusal: raised before the first token. failure: raised after `fails_after` tokens of each choice.
    hangs_after: so many tokens come, then nothing.
    """

    answers: Sequence[Sequence[int]] = ((*b"Hello, world!", EOS),)
    refusal: Exception | None = None
    failure: Exception | None = None
    fails_after: int = 0
    hangs_after: int | None = None
    is_up: bool = True
    requests: list[tuple[str, list[int], SamplingParams, int]] = field(default_factory=list)
    images: list[tuple[PromptImage, ...]] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    running: int = 0

    async def generate(
        self, request_id: str, prompt: list[int], sampling: SamplingParams, n: int, images: tuple[PromptImage, ...] = ()
    ) -> AsyncGenerator[TokenDelta, None]:
        self.requests.append((request_id, prompt, sampling, n))
        self.images.append(images)
        if self.refusal is not None:
            raise self.refusal
        self.running += 1
        unfinished = set(range(n))
        try:
            position = 0
            while unfinished:
                await asyncio.sleep(0)
                if self.failure is not None and position == self.fails_after:
                    raise self.failure
                if position == self.hangs_after:
                    await asyncio.Event().wait()
                for index in sorted(unfinished):
                    delta = self._delta(request_id, prompt, sampling, index, position)
                    if delta.finish_reason is not None:
                        unfinished.discard(index)
                    yield delta
                position += 1
        finally:
            self.running -= 1
            if unfinished:
                self.aborted.append(request_id)

    def _delta(
        self, request_id: str, prompt: list[int], sampling: SamplingParams, index: int, position: int
    ) -> TokenDelta:
        answer = self.answers[min(index, len(self.answers) - 1)]
        token = answer[position % len(answer)]
        finish = None
        if token in sampling.stop_token_ids and position >= sampling.min_tokens:
            finish = "stop"
        elif position + 1 == sampling.max_tokens:
            finish = "length"
        logprobs = None if sampling.logprobs is None else [_logprobs(token, sampling.logprobs)]
        prompt_logprobs: list[TokenLogprobs | None] | None = None
        if sampling.prompt_logprobs is not None and index == position == 0:
            prompt_logprobs = [None, *(_logprobs(t, sampling.prompt_logprobs) for t in prompt[1:])]
        cached = 4 if position == 0 else 0
        return TokenDelta(request_id, index, position, [token], logprobs, finish, cached, prompt_logprobs)

    async def faults(self) -> list[str]:
        return [] if self.is_up else ["experts [3] of layer 1 did not answer for 1 s"]


def _logprobs(token: int, count: int) -> TokenLogprobs:
    return TokenLogprobs(token, -0.5, 1, [(token, -0.5), (120, -1.5), (121, float("-inf"))][:count])


@pytest.fixture(autouse=True)
def _truncated_images_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's default, whoever imported Meta's module in this process."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def served(engine: FakeEngine) -> ServedModel:
    template = ChatTemplate(TEMPLATE, {})
    return ServedModel("tiny", ByteTokenizer(), engine, max_model_len=200, vocab_size=257, chat_template=template)


@pytest.fixture
def make_app(served: ServedModel) -> Callable[..., object]:
    def make(**config: object) -> object:
        metrics = FrontMetrics("front-0", 200)

        async def render_metrics() -> bytes:
            return render([snapshot(metrics.registry)])

        async def cluster() -> ClusterStatus:
            return ClusterStatus(
                fronts=[FrontStatus(replica_id="f0", pid=1, host="127.0.0.1")], silent={"engine-tiny": 1}
            )

        return build_api({"tiny": served}, FrontConfig(**config), metrics, render_metrics, cluster, "0.0.1")  # type: ignore[arg-type]

    return make


@pytest.fixture
async def client(make_app: Callable[..., object]) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=make_app())  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://front") as http:
        yield http
