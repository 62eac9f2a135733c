"""Renders a conversation with the checkpoint's own jinja2 template, in a sandbox."""

from collections.abc import Mapping, Sequence
from typing import Any


class ChatTemplateError(ValueError):
    """The template is malformed, or refused this conversation; the message is fit for the client."""


class ChatTemplate:
    """A compiled template. `special_tokens` (see Tokenizer.special_tokens) become variables of it.

    Raises ChatTemplateError when the source does not compile.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        raise NotImplementedError

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text, special tokens written out: encode it with `add_special_tokens=False`.

        messages: OpenAI messages as plain JSON types. Content parts of type "text" are joined with newlines unless
          the template takes parts itself.
        continue_final_message: leave the last message open, so that the answer continues it.
        template_kwargs: further variables (`chat_template_kwargs` of vLLM).

        Raises ChatTemplateError: the template refused (`raise_exception`), failed, or misbehaved.
        """
        raise NotImplementedError
