"""From a request's fields to the engine's `SamplingParams`; checks what depends on the model and on other fields."""

import secrets

from deployments.config import FrontConfig
from deployments.engine.request import SamplingParams
from deployments.front.errors import ApiError, invalid
from deployments.front.prompt import check_token_ids
from deployments.front.protocol.chat import ChatRequest
from deployments.front.protocol.completion import CompletionRequest
from deployments.front.protocol.sampling import MAX_INT
from deployments.front.served_model import ServedModel

Request = ChatRequest | CompletionRequest


def check(request: Request, model: ServedModel, config: FrontConfig) -> None:
    """What needs no prompt. Raises ApiError 400."""
    if request.n > config.max_choices:
        raise _over("n", request.n, config.max_choices)
    _check_logprobs(request, config)
    _check_stream(request)
    if request.token_limit is not None and request.min_tokens > max(request.token_limit, 1):
        raise invalid(f"'min_tokens' ({request.min_tokens}) exceeds 'max_tokens' ({request.token_limit})", "min_tokens")
    if isinstance(request, CompletionRequest):
        if request.best_of not in (None, request.n):
            raise invalid(f"'best_of' ({request.best_of}) must equal 'n' ({request.n}): no reranking", "best_of")
        if request.max_tokens == 0 and not request.echo:
            raise invalid("'max_tokens' must be at least 1 unless 'echo' is set", "max_tokens")
    check_token_ids(model, request.stop_token_ids, "stop_token_ids")
    check_token_ids(model, [int(token) for token in request.logit_bias], "logit_bias")


def sampling_params(request: Request, model: ServedModel, num_prompt_tokens: int) -> SamplingParams:
    """For a prompt of `num_prompt_tokens`. Raises ApiError 400 when it does not fit the context."""
    eos = () if request.ignore_eos else model.tokenizer.eos_token_ids
    prompt_logprobs = request.prompt_logprobs
    if isinstance(request, CompletionRequest) and request.echo and request.logprobs is not None:
        prompt_logprobs = max(prompt_logprobs or 0, request.logprobs)
    return SamplingParams(
        max_tokens=max_tokens(request, model, num_prompt_tokens),
        min_tokens=request.min_tokens,
        temperature=request.temperature,
        top_k=max(request.top_k, 0),
        top_p=request.top_p,
        min_p=request.min_p,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=request.repetition_penalty,
        logit_bias={int(token): bias for token, bias in request.logit_bias.items()},
        stop_token_ids=tuple(dict.fromkeys((*eos, *request.stop_token_ids))),
        seed=secrets.randbits(63) if request.seed is None else request.seed & MAX_INT,
        logprobs=request.num_logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def max_tokens(request: Request, model: ServedModel, num_prompt_tokens: int) -> int:
    """Output tokens that are asked for and fit; at least 1, since an engine always makes one."""
    limit, rest = model.max_model_len, model.max_model_len - num_prompt_tokens
    param = "messages" if isinstance(request, ChatRequest) else "prompt"
    begin = f"This model's maximum context length is {limit} tokens."
    if rest < 1:
        raise ApiError(
            400,
            f"{begin} However, your {param} resulted in {num_prompt_tokens} tokens, which leaves no room for output. "
            f"Please reduce the length of the {param}.",
            param,
            "context_length_exceeded",
        )
    asked = request.token_limit
    if asked is None or not _is_explicit(request):
        return rest if asked is None else min(asked, rest)
    if asked > rest:
        raise ApiError(
            400,
            f"{begin} However, you requested {asked + num_prompt_tokens} tokens ({num_prompt_tokens} in the {param}, "
            f"{asked} in the completion). Please reduce the length of the {param} or completion.",
            "max_tokens",
            "context_length_exceeded",
        )
    return max(asked, 1)


def _is_explicit(request: Request) -> bool:
    """Whether the client itself set a limit, so that cutting it would not do what was asked."""
    return not request.model_fields_set.isdisjoint(("max_tokens", "max_completion_tokens"))


def _check_logprobs(request: Request, config: FrontConfig) -> None:
    asked = {"prompt_logprobs": request.prompt_logprobs}
    if isinstance(request, ChatRequest):
        asked["top_logprobs"] = request.top_logprobs
        if request.top_logprobs and not request.logprobs:
            raise invalid("'top_logprobs' needs 'logprobs' to be true", "top_logprobs")
    else:
        asked["logprobs"] = request.logprobs
    for name, value in asked.items():
        if value is not None and value > config.max_logprobs:
            raise _over(name, value, config.max_logprobs)
    if request.stream and request.prompt_logprobs is not None:
        raise invalid("'prompt_logprobs' are not available in a stream", "prompt_logprobs")


def _check_stream(request: Request) -> None:
    if request.stream_options is not None and not request.stream:
        raise invalid("'stream_options' needs 'stream' to be true", "stream_options")


def _over(param: str, value: int, limit: int) -> ApiError:
    return invalid(f"Invalid {param!r}: {value} is more than this server's limit of {limit}", param, "invalid_value")
