"""The state of one choice of one request, from its arrival to its last token."""

import enum
import time

from deployments.engine.blocks import block_hash, root_hash
from deployments.engine.request import EngineRequest, TokenLogprobs
from model.penalties import SeenTokens


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """Choice `index` of `request`.

    arrival: order among all sequences of the engine; smaller came earlier. outputs: tokens that were
    produced before, by this engine or another; they count as output but are computed with the prompt.

    tokens: prompt and output so far. num_computed: how many of them have keys and values in `blocks`, of
    which there is a list for each KV group (kv_blocks.py).
    last_patch: position of the last token that stands for a part of an image, -1 without images.
    A sequence with one token left to compute is decoding; with more it is in prefill.
    """

    def __init__(
        self,
        request: EngineRequest,
        index: int,
        arrival: int,
        *,
        salt: bytes = b"",
        outputs: tuple[int, ...] = (),
    ) -> None:
        self.request, self.index, self.arrival = request, index, arrival
        self.sampling = request.sampling
        self.stop_token_ids = frozenset(request.sampling.stop_token_ids)
        self.last_patch = int(request.images[-1].patches[-1]) if request.images else -1
        self.tokens = [*request.prompt, *outputs]
        self.num_prompt = len(request.prompt)
        self.num_computed = 0
        self.num_cached: int | None = None
        self.is_resumed = bool(outputs)
        self.blocks: list[list[int]] = []
        self.num_published = self.num_unseen = 0
        self.slot = -1
        self.num_tabled = 0
        self.status = Status.WAITING
        self.prompt_logprobs: list[TokenLogprobs | None] = [None]
        self.siblings: list[Sequence] = []
        self.num_preemptions = 0
        self.arrived, self.started, self.first_output = time.monotonic(), 0.0, 0.0
        self._hashes: list[bytes] = []
        self._root = root_hash(salt)
        self.seen = SeenTokens(request.prompt, outputs) if _is_penalized(self) else None

    @property
    def num_outputs(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens without keys and values yet."""
        return len(self.tokens) - self.num_computed

    @property
    def is_unstarted(self) -> bool:
        return self.num_cached is None

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether logits of prompt tokens are still to be computed for their log probabilities."""
        wanted = self.sampling.prompt_logprobs is not None and self.index == 0 and not self.is_resumed
        return wanted and len(self.prompt_logprobs) < self.num_prompt

    def hashes(self, count: int, block_size: int) -> list[bytes]:
        """Of the first `count` blocks, all of them full."""
        known = self._hashes
        while len(known) < count:
            start = len(known) * block_size
            parent = known[-1] if known else self._root
            end = start + block_size
            known.append(block_hash(parent, self.tokens[start:end], self._images_within(start, end)))
        return known[:count] if len(known) > count else known

    def _images_within(self, start: int, end: int) -> bytes:
        """What tokens of images at these positions stand for; of a prompt without images nothing."""
        images = [image for image in self.request.images if image.patches[0] < end and image.patches[-1] >= start]
        return "".join(f"{image.patches[0]}:{image.digest};" for image in images).encode()

    def append(self, token: int) -> None:
        self.tokens.append(token)
        if self.seen is not None:
            self.seen.add(token)

    def finish_reason(self, max_model_len: int) -> str | None:
        """Why the last token is the last, if it is."""
        if self.tokens[-1] in self.stop_token_ids and self.num_outputs > self.sampling.min_tokens:
            return "stop"
        if self.num_outputs >= self.sampling.max_tokens or len(self.tokens) >= max_model_len:
            return "length"
        return None


def _is_penalized(sequence: Sequence) -> bool:
    sampling = sequence.sampling
    return bool(sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1.0)
