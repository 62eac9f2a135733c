"""Shapes of what the server answers.

They document (OpenAPI) and test the answers; the answers themselves are written as plain JSON,
since building a model for each token would cost more than the token's text.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class _Response(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorDetail(_Response):
    """`type` is the family of the error; `param` names the field at fault; `code` is for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(_Response):
    """OpenAI's shape of an error."""

    error: ErrorDetail


class PromptTokensDetails(_Response):
    """`cached_tokens`: how many the prefix cache spared the model."""

    cached_tokens: int


class Usage(_Response):
    """Tokens of all prompts and all choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


class PromptLogprob(_Response):
    """One alternative at a position of the prompt, by token id (vLLM's shape)."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class TopLogprob(_Response):
    """A token and its log probability."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A chosen token beside its alternatives."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Response):
    """Of each token of a message."""

    content: list[TokenLogprob]


class ChatMessage(_Response):
    """What the model said."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(_Response):
    """`stop_reason`: the stop string or token id that ended it."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None
    token_ids: list[int] | None = None


class ChatCompletion(_Response):
    """The answer to a chat request."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None


class ChatDelta(_Response):
    """New text of a message; the role comes first."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(_Response):
    """News of one choice."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatChunk(_Response):
    """One event of a chat stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None


class CompletionLogprobs(_Response):
    """Parallel lists, one entry a token; offsets are in characters of the choice's text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(_Response):
    """`finish_reason` is null in a stream's earlier events."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: int | str | None = None
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None


class Completion(_Response):
    """The answer to a completion request, and each event of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ModelCard(_Response):
    """A served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    root: str
    max_model_len: int


class ModelList(_Response):
    """All served models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(_Response):
    """`models`: which of them answer."""

    status: Literal["ok"]
    models: list[str]


class Version(_Response):
    """Of the server."""

    version: str
