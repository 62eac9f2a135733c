"""From what a request says to the tokens that the model sees."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from deployments.engine.request import PromptImage
from deployments.front.chat_template import ChatTemplateError
from deployments.front.errors import invalid
from deployments.front.images import ImageError, PreparedImage
from deployments.front.protocol.chat import ConversationFields
from deployments.front.served_model import ServedModel

LONG_CHARACTERS = 4096
"""A longer text is encoded in a thread, so that streams go on meanwhile."""

_threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="encode")


@dataclass(frozen=True)
class Prompt:
    """Tokens of one prompt and the images among them.

    text: what they were made of, or None if the client sent tokens.
    """

    token_ids: list[int]
    text: str | None = None
    images: tuple[PromptImage, ...] = ()


async def from_conversation(model: ServedModel, request: ConversationFields) -> Prompt:
    """The conversation as the model's chat template writes it. Raises ApiError 400."""
    template = model.chat_template
    if template is None:
        raise invalid(f"The model {model.id!r} has no chat template; use /v1/completions", "model", "no_chat_template")
    asked = "add_generation_prompt" in request.model_fields_set and request.add_generation_prompt
    if request.continue_final_message and asked:
        raise invalid(
            "'continue_final_message' and 'add_generation_prompt' exclude each other", "continue_final_message"
        )
    messages = [message.for_template() for message in request.messages]
    images = await _images(model, request)

    def render_and_encode() -> Prompt:
        text = template.render(
            messages,
            add_generation_prompt=request.add_generation_prompt and not request.continue_final_message,
            continue_final_message=request.continue_final_message,
            template_kwargs=request.chat_template_kwargs,
        )
        ids = model.tokenizer.encode(text, add_special_tokens=request.add_special_tokens)
        if model.images is None:
            return Prompt(ids, text)
        ids, placed = model.images.place(ids, images)
        return Prompt(ids, text, placed)

    try:
        length = sum(len(str(message["content"])) for message in messages)
        return _not_empty(await _run(render_and_encode, length, beside=bool(images)), "messages")
    except (ChatTemplateError, ImageError) as error:
        raise invalid(str(error), "messages") from error


async def _images(model: ServedModel, request: ConversationFields) -> list[PreparedImage]:
    """The conversation's images, in order. Raises ApiError 400."""
    urls = [image for message in request.messages for image in message.images]
    if not urls:
        return []
    if model.images is None:
        raise invalid(f"The model {model.id!r} sees no images", "messages", "images_not_supported")
    if len(urls) > model.images.max_images:
        most = model.images.max_images
        raise invalid(f"'messages' hold {len(urls)} images, this server takes {most}", "messages", "too_many_images")
    try:
        return await model.images.read([image.url for image in urls], [image.detail == "low" for image in urls])
    except ImageError as error:
        raise invalid(f"An image in 'messages' cannot be used: {error}", "messages", "invalid_image") from error


async def from_text(model: ServedModel, text: str, add_special_tokens: bool, param: str = "prompt") -> Prompt:
    """The text as it is. Raises ApiError 400."""
    return _not_empty(await encoded(model, text, add_special_tokens), param)


async def encoded(model: ServedModel, text: str, add_special_tokens: bool) -> Prompt:
    """The text as it is; it may hold no tokens."""

    def encode() -> Prompt:
        return Prompt(model.tokenizer.encode(text, add_special_tokens=add_special_tokens), text)

    return await _run(encode, len(text))


def from_tokens(model: ServedModel, token_ids: list[int], param: str = "prompt") -> Prompt:
    """The client's own tokens. Raises ApiError 400."""
    check_token_ids(model, token_ids, param)
    return Prompt(token_ids)


def check_token_ids(model: ServedModel, token_ids: list[int], param: str) -> None:
    """Raises ApiError 400 unless all are in the vocabulary."""
    size = model.vocab_size
    if token_ids and max(token_ids) >= size:
        wrong = next(i for i in token_ids if i >= size)
        raise invalid(f"Invalid {param!r}: token id {wrong} is not in the vocabulary of {size} tokens", param)


def _not_empty(prompt: Prompt, param: str) -> Prompt:
    if not prompt.token_ids:
        raise invalid(f"Invalid {param!r}: it holds no tokens", param)
    return prompt


async def _run(encode: Callable[[], Prompt], characters: int, *, beside: bool = False) -> Prompt:
    """beside: in a thread in any case; an image may be thousands of tokens."""
    if characters <= LONG_CHARACTERS and not beside:
        return encode()
    return await asyncio.get_running_loop().run_in_executor(_threads, encode)
