"""`POST /v1/chat/completions` and `POST /v1/completions`."""

import asyncio
import time
import uuid
from collections.abc import Mapping

from fastapi import APIRouter, Request
from fastapi.responses import Response

from deployments.config import FrontConfig
from deployments.front import prompt
from deployments.front.answer import Answer, StreamedAnswer
from deployments.front.body import read
from deployments.front.chat_format import ChatFormat
from deployments.front.completion_format import CompletionFormat
from deployments.front.generation import Generation
from deployments.front.metrics import FrontMetrics
from deployments.front.openapi import responses
from deployments.front.prompt import Prompt
from deployments.front.protocol.chat import ChatRequest
from deployments.front.protocol.completion import CompletionRequest
from deployments.front.protocol.response import ChatCompletion, Completion
from deployments.front.sampling import check
from deployments.front.served_model import ServedModel
from deployments.front.status_routes import find

STATUSES = (400, 401, 404, 413, 415, 429, 500, 503)


class GeneratingRoutes:
    """From a request to an answer: validate, tokenize, generate."""

    def __init__(
        self, models: Mapping[str, ServedModel], config: FrontConfig, metrics: FrontMetrics, version: str
    ) -> None:
        self._models = models
        self._config = config
        self._metrics = {model: metrics.of_model(model) for model in models}
        self._fingerprint = f"moray-{version}"

    def add_to(self, api: APIRouter) -> None:
        """Registers the endpoints."""
        chat = responses(ChatCompletion, *STATUSES, streams=True)
        api.post("/v1/chat/completions", responses=chat, tags=["generate"])(self.create_chat_completion)
        completion = responses(Completion, *STATUSES, streams=True)
        api.post("/v1/completions", responses=completion, tags=["generate"])(self.create_completion)

    async def create_chat_completion(self, http: Request) -> Response:
        """Continues a conversation."""
        arrived = time.perf_counter()
        request = await read(http, ChatRequest, self._config.max_body_size)
        model = find(self._models, request.model)
        check(request, model, self._config)
        prompts = [await prompt.from_conversation(model, request)]
        generation = self._generation("chatcmpl", request, model, prompts, arrived)
        form = ChatFormat(request, generation, int(time.time()), self._fingerprint)
        return StreamedAnswer(generation, form) if request.stream else Answer(generation, form)

    async def create_completion(self, http: Request) -> Response:
        """Continues one or several texts."""
        arrived = time.perf_counter()
        request = await read(http, CompletionRequest, self._config.max_body_size)
        model = find(self._models, request.model)
        check(request, model, self._config)
        prompts = await _prompts(model, request)
        generation = self._generation("cmpl", request, model, prompts, arrived)
        form = CompletionFormat(request, generation, int(time.time()), self._fingerprint)
        return StreamedAnswer(generation, form) if request.stream else Answer(generation, form)

    def _generation(
        self,
        kind: str,
        request: ChatRequest | CompletionRequest,
        model: ServedModel,
        prompts: list[Prompt],
        arrived: float,
    ) -> Generation:
        request_id = f"{kind}-{uuid.uuid4().hex}"
        return Generation(request_id, request, model, prompts, self._metrics[model.id], arrived)


async def _prompts(model: ServedModel, request: CompletionRequest) -> list[Prompt]:
    prompts = []
    for given in request.prompts:
        if isinstance(given, str):
            prompts.append(await prompt.from_text(model, given, request.add_special_tokens))
        else:
            prompts.append(prompt.from_tokens(model, given))
        # Thousands of short prompts take as long as one long prompt: others get their turn in between.
        await asyncio.sleep(0)
    return prompts
