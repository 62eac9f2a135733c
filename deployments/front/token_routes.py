"""`POST /tokenize` and `POST /detokenize`."""

from collections.abc import Mapping

from fastapi import APIRouter, Request
from fastapi.responses import Response
from msgspec.json import encode

from deployments.config import FrontConfig
from deployments.front import prompt
from deployments.front.body import parse, read, read_bytes, validated
from deployments.front.openapi import responses
from deployments.front.protocol.tokenize import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeChatRequest,
    TokenizeResponse,
    TokenizeTextRequest,
)
from deployments.front.served_model import ServedModel
from deployments.front.status_routes import find

STATUSES = (400, 401, 404, 413, 415, 500)


class TokenRoutes:
    """The tokenizers by themselves; no engine is asked."""

    def __init__(self, models: Mapping[str, ServedModel], config: FrontConfig) -> None:
        self._models = models
        self._config = config

    def add_to(self, api: APIRouter) -> None:
        """Registers the endpoints."""
        api.post("/tokenize", responses=responses(TokenizeResponse, *STATUSES), tags=["tokens"])(self.tokenize)
        api.post("/detokenize", responses=responses(DetokenizeResponse, *STATUSES), tags=["tokens"])(self.detokenize)

    async def tokenize(self, http: Request) -> Response:
        """Tokens of a text, or of a conversation as the chat template writes it."""
        data = parse(await read_bytes(http, self._config.max_body_size))
        request: TokenizeChatRequest | TokenizeTextRequest
        if isinstance(data, dict) and "messages" in data:
            request = validated(data, TokenizeChatRequest)
            model = find(self._models, request.model)
            tokens = (await prompt.from_conversation(model, request)).token_ids
        else:
            request = validated(data, TokenizeTextRequest)
            model = find(self._models, request.model)
            tokens = (await prompt.encoded(model, request.prompt, request.add_special_tokens)).token_ids
        strings = [model.tokenizer.token_text(token) for token in tokens] if request.return_token_strs else None
        answer = {"count": len(tokens), "max_model_len": model.max_model_len, "tokens": tokens, "token_strs": strings}
        return Response(encode(answer), media_type="application/json")

    async def detokenize(self, http: Request) -> Response:
        """Text of tokens, special tokens included."""
        request = await read(http, DetokenizeRequest, self._config.max_body_size)
        model = find(self._models, request.model)
        prompt.check_token_ids(model, request.tokens, "tokens")
        text = model.tokenizer.decode(request.tokens, skip_special_tokens=False)
        return Response(encode({"prompt": text}), media_type="application/json")
