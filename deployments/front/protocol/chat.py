"""`POST /v1/chat/completions`: the request."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from deployments.front.protocol.base import RequestModel
from deployments.front.protocol.sampling import MAX_INT, REFUSED, SamplingFields


class TextPart(RequestModel):
    """A piece of a message's text."""

    type: Literal["text"]
    text: str


class ImageUrl(RequestModel):
    """Where an image is."""

    url: str
    """`data:<media type>;base64,<data>`; or `http(s)`, from hosts that the server allows."""
    detail: Literal["auto", "low", "high"] = "auto"
    """"low" shows the model the whole image in one tile; the others cut a large one into several."""


class ImagePart(RequestModel):
    """An image at its place in a message, for models that see."""

    type: Literal["image_url"]
    image_url: ImageUrl


def _kind(part: Any) -> str | None:
    """The branch of a part; not that of its type, so that an error's path leaves out the branch and nothing else."""
    kind = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    return f"{kind} part" if isinstance(kind, str) else None


Part = Annotated[
    Annotated[TextPart, Tag("text part")] | Annotated[ImagePart, Tag("image_url part")],
    Discriminator(
        _kind,
        custom_error_type="part_type",
        custom_error_message="a part of a message must be an object of type 'text' or 'image_url'",
    ),
]


def _branch(content: Any) -> str:
    return "list of parts" if isinstance(content, list) else "whole text"


Content = Annotated[
    Annotated[str, Tag("whole text")] | Annotated[list[Part], Field(min_length=1), Tag("list of parts")],
    Discriminator(_branch),
]


class Message(RequestModel):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    """"developer" is OpenAI's newer word for "system", which is what templates know."""
    content: Content
    name: str | None = None

    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "tool_calls": ([],),
        "tool_call_id": (),
        "function_call": (),
        "refusal": (),
        "audio": (),
        "annotations": ([],),
        "reasoning": (),
        "reasoning_content": (),
    }

    @property
    def images(self) -> list[ImageUrl]:
        """In order."""
        return [part.image_url for part in self.content if isinstance(part, ImagePart)]

    def for_template(self) -> dict[str, Any]:
        """As templates take it: of an image only its place is left."""
        role = "system" if self.role == "developer" else self.role
        content = self.content
        parts = content if isinstance(content, str) else [_for_template(part) for part in content]
        message = {"role": role, "content": parts}
        return message if self.name is None else {**message, "name": self.name}


def _for_template(part: TextPart | ImagePart) -> dict[str, Any]:
    return {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part.text}


class ConversationFields(RequestModel):
    """How messages become a prompt."""

    messages: list[Message] = Field(min_length=1)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    """Leave the last message open, so that the answer continues it; `add_generation_prompt` must then be false."""
    add_special_tokens: bool = False
    """Tokens such as BOS on top of those that the template writes."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further variables of the template."""


class ChatRequest(ConversationFields, SamplingFields):
    """OpenAI's fields and vLLM's."""

    max_completion_tokens: int | None = Field(default=None, ge=1, le=MAX_INT)
    """By default all that is left of the context."""
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_INT)
    """Older name of `max_completion_tokens`."""
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=MAX_INT)
    """Only with `logprobs`."""
    parallel_tool_calls: bool = True
    """No effect: there are no tools."""

    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **REFUSED,
        "tools": ([],),
        "tool_choice": ("none",),
        "functions": ([],),
        "function_call": ("none",),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "reasoning_effort": ("none",),
        "include_reasoning": (True, False),
        "verbosity": (),
        "web_search_options": (),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "documents": ([],),
        "chat_template": (),
        "echo": (False,),
        "mm_processor_kwargs": ({},),
        "best_of": (1,),
    }

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None
