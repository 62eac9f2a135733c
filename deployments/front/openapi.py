"""The OpenAPI document, as exact as the server: request bodies, error answers, the names of the models.

Bodies are read and validated by `body.read` and not by FastAPI, so their schemas are added here.
"""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from deployments.config import FrontConfig
from deployments.front.protocol.chat import ChatRequest
from deployments.front.protocol.completion import CompletionRequest
from deployments.front.protocol.response import ErrorResponse
from deployments.front.protocol.tokenize import DetokenizeRequest, TokenizeChatRequest, TokenizeTextRequest
from deployments.front.served_model import ServedModel

REF = "#/components/schemas/{model}"
BODIES: Mapping[str, tuple[type[BaseModel], ...]] = {
    "/v1/chat/completions": (ChatRequest,),
    "/v1/completions": (CompletionRequest,),
    "/tokenize": (TokenizeTextRequest, TokenizeChatRequest),
    "/detokenize": (DetokenizeRequest,),
}
REASONS = {
    400: "The request is malformed, or asks for what this server or the model's context cannot give",
    401: "No valid API key",
    404: "No such model",
    413: "The body is too large",
    415: "The body is not declared as JSON",
    429: "Too many requests are waiting; see Retry-After",
    500: "The server failed",
    503: "No engine is available",
}


def responses(model: type[BaseModel] | None, *statuses: int, streams: bool = False) -> dict[int | str, dict[str, Any]]:
    """What an endpoint may answer: `model` with 200, and errors."""
    described: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorResponse, "description": REASONS[status]} for status in statuses
    }
    if model is not None:
        described[200] = {"model": model}
    if streams:
        described[200]["content"] = {"text/event-stream": {"schema": {"type": "string"}}}
    return described


def describe(app: FastAPI, models: Mapping[str, ServedModel], config: FrontConfig) -> None:
    """Makes `app.openapi` give the whole document."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            _add_bodies(document, list(models))
            _add_limits(document["components"]["schemas"], config)
            if config.api_keys:
                _add_security(document)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _add_bodies(document: dict[str, Any], models: list[str]) -> None:
    requests = [model for body in BODIES.values() for model in body]
    _, definitions = models_json_schema([(model, "validation") for model in requests], ref_template=REF)
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas.update(definitions["$defs"])
    for model in requests:
        schemas[model.__name__]["properties"]["model"] = {"type": "string", "enum": models}
    for path, body in BODIES.items():
        refs = [{"$ref": REF.format(model=model.__name__)} for model in body]
        schema = refs[0] if len(refs) == 1 else {"anyOf": refs}
        content = {"application/json": {"schema": schema}}
        document["paths"][path]["post"]["requestBody"] = {"required": True, "content": content}


def _add_limits(schemas: dict[str, Any], config: FrontConfig) -> None:
    limits = {
        "n": config.max_choices,
        "logprobs": config.max_logprobs,
        "top_logprobs": config.max_logprobs,
        "prompt_logprobs": config.max_logprobs,
    }
    for request in (ChatRequest, CompletionRequest):
        for name, limit in limits.items():
            branches = schemas[request.__name__]["properties"].get(name, {}).get("anyOf", ())
            for branch in branches:
                if branch["type"] == "integer":
                    branch["maximum"] = limit


def _add_security(document: dict[str, Any]) -> None:
    document["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        if path.startswith("/v1/") or path in BODIES:
            for operation in operations.values():
                operation["security"] = [{"bearer": []}]
