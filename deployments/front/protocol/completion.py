"""`POST /v1/completions`: the request."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field
from pydantic.functional_validators import WrapValidator
from pydantic_core import PydanticCustomError

from deployments.front.protocol.sampling import MAX_INT, REFUSED, SamplingFields, TokenId

MAX_PROMPTS = 2048

Text = Annotated[str, Field(min_length=1)]
TokenPrompt = Annotated[list[TokenId], Field(min_length=1)]
Prompts = (
    Text
    | TokenPrompt
    | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
    | Annotated[list[TokenPrompt], Field(min_length=1, max_length=MAX_PROMPTS)]
)


def _one_message(value: Any, validate: Any) -> Any:
    """Replaces the errors of four union branches by one that says what is accepted."""
    try:
        return validate(value)
    except ValueError as error:
        raise PydanticCustomError(
            "prompt_type",
            "must be a string, a list of token ids, or a list (1 to {limit}) of either, none of them without tokens",
            {"limit": MAX_PROMPTS},
        ) from error


class CompletionRequest(SamplingFields):
    """OpenAI's fields and vLLM's."""

    prompt: Annotated[Prompts, WrapValidator(_one_message)]
    max_tokens: int = Field(default=16, ge=0, le=MAX_INT)
    """0 only with `echo`: report the prompt alone."""
    best_of: int | None = Field(default=None, ge=1, le=MAX_INT)
    """Must equal `n`: there is no reranking."""
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=MAX_INT)
    add_special_tokens: bool = True

    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = {**REFUSED, "suffix": ("",), "prompt_embeds": ()}

    @property
    def token_limit(self) -> int:
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry for each prompt."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)
