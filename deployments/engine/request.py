"""The boundary between fronts and engines: what a front asks, what a step answers.

Requests travel through a Serve handle, one unary call each. Answers travel over a
channel, one `StepMessage` for each front and step, as msgpack.
"""

from dataclasses import dataclass, field

import msgspec
import numpy as np
from numpy.typing import NDArray

from cluster.channel import Address


@dataclass(frozen=True)
class SamplingParams:
    """How to choose each next token, and when to stop. Already validated by the front.

    `temperature` 0 is greedy. `top_k` 0 keeps all tokens. `stop_token_ids` includes the
    model's end-of-sequence tokens unless the request ignores them; none of them can be
    sampled before `min_tokens`. The random number for the token at output position `p` is a
    function of (`seed`, choice index, `p`) alone, so any engine continues any request identically.
    `logprobs` is how many alternatives to report for each token: None reports nothing, 0 only
    the chosen token. `prompt_logprobs` is the same for the prompt's tokens.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True, eq=False)
class PromptImage:
    """One image of a prompt, cut into tiles.

    tiles: uint8 [num_tiles, 3, height, width].
    patches: int64, positions in the prompt of the tokens that stand for it: ascending, in the order of
      the tiles' embeddings.
    digest: names the tiles; equal digests mean equal tiles.
    """

    tiles: NDArray[np.uint8]
    patches: NDArray[np.int64]
    digest: str


@dataclass(frozen=True)
class EngineRequest:
    """One prompt and its `n` choices. `request_id` is unique over the cluster; `images` are in the prompt's order.

    outputs: empty for a new request. For one that another engine began, the tokens of each choice so far, or None
    for a choice that has finished: generation goes on from there as if nothing had happened, and is never refused
    for want of room in the queue.
    """

    request_id: str
    prompt: list[int]
    sampling: SamplingParams
    reply_to: Address
    n: int = 1
    images: tuple[PromptImage, ...] = ()
    outputs: tuple[tuple[int, ...] | None, ...] = ()


class TokenLogprobs(msgspec.Struct, array_like=True, frozen=True):
    """One position: the token there, its log probability and rank (1 is the likeliest), and the top alternatives."""

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


class TokenDelta(msgspec.Struct, array_like=True, frozen=True):
    """New tokens of one choice of one request.

    offset: how many output tokens of this choice came before these.
    finish_reason: None while it goes on; then "stop" (a stop token, which is the last of
      `token_ids`), "length", or "abort".
    num_cached_tokens: prompt tokens whose keys and values the prefix cache held; set with a
      choice's first delta.
    prompt_logprobs: with the first delta of choice 0 when asked for; the first position is None.
    """

    request_id: str
    index: int
    offset: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None


class StepMessage(msgspec.Struct, array_like=True, frozen=True):
    """All that one engine step produced for one front. Without deltas it only says that `engine` lives.

    engine: the replica's id.
    """

    deltas: list[TokenDelta]
    engine: str = ""


@dataclass(frozen=True)
class VisionDescription:
    """Which images an engine takes: tiles of `tile_size` pixels squared, each of which is `tokens_per_tile` tokens."""

    tile_size: int
    tokens_per_tile: int


@dataclass(frozen=True)
class EngineDescription:
    """What an engine serves and how much of it fits.

    num_kv_tokens: what the KV cache holds at least, over all requests; longer sequences of a model with chunked
    layers take less than their tokens. vision: None when the model sees no images.
    """

    model_id: str
    max_model_len: int
    vocab_size: int
    dtype: str
    block_size: int
    num_kv_tokens: int
    max_num_seqs: int
    max_num_batched_tokens: int
    vision: VisionDescription | None = None


class RequestTooLong(ValueError):
    """Prompt and output cannot fit the context length or the KV cache, not even alone."""


class StepFailed(RuntimeError):
    """The engine failed while it computed this request; other requests went on."""


class ExpertsGone(RuntimeError):
    """No expert server answered for experts that this request needs. Neither it nor the engine is at fault, and
    another engine would ask the same servers. The message names the experts."""


class FrontLost(RuntimeError):
    """The engine could not reach the front that asked; if that lives after all, another engine may."""


class EngineStopping(RuntimeError):
    """The engine is shutting down; another may take the request."""


class QueueFull(Exception):
    """The engine has as many waiting requests as it admits. `retry_after` is in seconds."""

    def __init__(self, waiting: int, retry_after: float) -> None:
        super().__init__(waiting, retry_after)
        self.waiting = waiting
        self.retry_after = retry_after
