"""`POST /tokenize` and `POST /detokenize`, as vLLM has them."""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, Field

from deployments.front.protocol.base import RequestModel
from deployments.front.protocol.chat import ConversationFields
from deployments.front.protocol.sampling import TokenId


class TokenizeTextRequest(RequestModel):
    """Tokens of a text."""

    model: str
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChatRequest(ConversationFields):
    """Tokens of a conversation as the model would see it."""

    model: str
    return_token_strs: bool = False
    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = {"tools": ([],), "chat_template": ()}


class TokenizeResponse(BaseModel):
    """Token ids of the text, and how many fit the model."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(RequestModel):
    """Text of tokens."""

    model: str
    tokens: list[TokenId] = Field()


class DetokenizeResponse(BaseModel):
    """The text, special tokens included."""

    prompt: str
