"""The fields that chat and plain completions share: how to sample, when to stop, what to report."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from deployments.front.protocol.base import RequestModel

MAX_INT = 2**63 - 1

StopString = Annotated[str, Field(min_length=1, max_length=1024)]
TokenIdKey = Annotated[str, Field(pattern=r"^[0-9]{1,18}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenId = Annotated[int, Field(ge=0, le=MAX_INT)]


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class StreamOptions(RequestModel):
    """What a stream reports beside the text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    """With `include_usage`: usage so far in every chunk."""
    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = {"include_obfuscation": (False,)}


class TextFormat(RequestModel):
    """The only output format there is so far: free text."""

    type: Literal["text"]


class SamplingFields(RequestModel):
    """Ranges are OpenAI's, or vLLM's where OpenAI has no such field."""

    model: str
    n: int = Field(default=1, ge=1, le=MAX_INT)
    temperature: float = Field(default=1.0, ge=0, le=2)
    """0 always takes the likeliest token."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1, le=MAX_INT)
    """0 and -1 keep every token."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    repetition_penalty: float = Field(default=1.0, ge=0.001, le=1000)
    logit_bias: dict[TokenIdKey, Bias] = Field(default_factory=dict)
    """Token id, as a string -> what to add to its logit."""
    seed: int | None = Field(default=None, ge=-(2**63), le=MAX_INT)
    """The same seed gives the same tokens; without one each request draws its own."""

    stop: Annotated[
        list[StopString],
        BeforeValidator(_listed, json_schema_input_type=StopString | Annotated[list[StopString], Field(max_length=64)]),
        Field(max_length=64),
    ] = Field(default_factory=list)
    include_stop_str_in_output: bool = False
    stop_token_ids: list[TokenId] = Field(default_factory=list, max_length=1024)
    ignore_eos: bool = False
    min_tokens: int = Field(default=0, ge=0, le=MAX_INT)

    stream: bool = False
    stream_options: StreamOptions | None = None
    """Only with `stream`."""
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_INT)
    """Alternatives to report for each token of the prompt; not with `stream`."""
    return_tokens_as_token_ids: bool = False
    """Write tokens in logprobs as "token_id:<id>"."""
    return_token_ids: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    """No effect: text is the exact bytes of the tokens."""
    response_format: TextFormat | None = None

    user: str | None = None
    """For the client's own records, like the next ones; no effect."""
    metadata: dict[str, str] = Field(default_factory=dict)
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    request_id: str | None = None
    """A name for the client's own records; responses carry the server's id."""

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def has_continuous_usage(self) -> bool:
        return self.stream_options is not None and self.includes_usage and self.stream_options.continuous_usage_stats


REFUSED: Mapping[str, tuple[Any, ...]] = {
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "truncate_prompt_tokens": (),
    "truncation_side": (),
    "priority": (0,),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "logprob_token_ids": ([],),
    "logits_processors": ([],),
    "kv_transfer_params": (),
    "cache_salt": (),
    "vllm_xargs": ({},),
    "stream_interval": (1,),
    "thinking_token_budget": (),
}
"""What neither endpoint supports; see `RequestModel.refused`."""
