"""Errors in OpenAI's shape, and how what may go wrong becomes one.

Types and codes are those of OpenAI's API, so that clients raise the exceptions their users expect.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from fastapi.responses import Response
from pydantic import BaseModel, ValidationError

from deployments.engine.request import QueueFull, RequestTooLong
from deployments.front.engine_client import EngineFailure, EngineUnavailable

NOT_IN_PATHS = ("whole text", "list of parts", "text part", "image_url part", "[key]")
"""What pydantic puts into an error's location beside names: tags of unions, and that it is about a key."""

SHOWN_CHARACTERS = 100
"""Of a wrong value or a field's path, in an error."""


@dataclass(eq=False)
class ApiError(Exception):
    """An answer other than 200. `param` is the field at fault, `code` a word for programs."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> bytes:
        """As JSON, also the data of an `error` event in a stream."""
        error = {"message": self.message, "type": _type(self.status), "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})

    @property
    def response(self) -> Response:
        return Response(self.body, self.status, self.headers, media_type="application/json")


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that cannot be served as it is."""
    return ApiError(400, message, param, code)


def from_engine(error: Exception) -> ApiError:
    """What the client is told when an engine refuses or fails. Raises `error` if it is nothing of that kind."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(
            429,
            f"The server has {error.waiting} requests waiting already; try again later",
            code="queue_full",
            headers={"Retry-After": str(max(1, math.ceil(error.retry_after)))},
        )
    if isinstance(error, RequestTooLong):
        return invalid(str(error), code="context_length_exceeded")
    if isinstance(error, EngineUnavailable):
        return ApiError(
            503, f"{error}; it is safe to try again", code="engine_unavailable", headers={"Retry-After": "1"}
        )
    if isinstance(error, EngineFailure):
        return ApiError(500, str(error), code="engine_error")
    raise error


INTERNAL = ApiError(500, "The server had an error while processing the request", code="internal_error")


def from_validation(error: ValidationError, model: type[BaseModel]) -> ApiError:
    """The first thing that is wrong with a request, with its field and value."""
    first = error.errors(include_url=False)[0]
    param = _path(first["loc"])
    if not param and first["type"] != "unsupported":
        return invalid(f"The body must be a JSON object; got {_short(first['input'])}", code="invalid_value")
    match first["type"]:
        case "unsupported":
            param = _path((*first["loc"], first["ctx"]["name"]))
            return invalid(f"{param!r} is not supported by this server", param, "unsupported_parameter")
        case "extra_forbidden":
            hint = difflib.get_close_matches(str(first["loc"][-1]), _fields(model), n=1)
            meant = f"; did you mean {hint[0]!r}?" if hint else ""
            return invalid(f"Unknown parameter: {_short(param)}{meant}", param, "unknown_parameter")
        case "missing":
            return invalid(f"Missing required parameter: {param!r}", param, "missing_required_parameter")
    return invalid(f"Invalid {param!r}: {first['msg']}; got {_short(first['input'])}", param, "invalid_value")


def _type(status: int) -> str:
    if status >= 500:
        return "server_error"
    return {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(
        status, "invalid_request_error"
    )


def _path(location: tuple[int | str, ...]) -> str:
    """`messages[0].content`; pydantic's names of union branches are left out."""
    path = ""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif step not in NOT_IN_PATHS:
            path += f".{step}" if path else step
    return _cut(path)


def _fields(model: type[BaseModel]) -> list[str]:
    return list(model.model_fields)


def _short(value: Any) -> str:
    try:
        text = msgspec.json.encode(value).decode()
    except (TypeError, ValueError, RecursionError):
        text = repr(value)
    return _cut(text)


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"
