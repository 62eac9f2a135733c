"""Reads a request's JSON: bounded in size and depth, without NaN, and valid UTF-8 throughout."""

from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from deployments.front.errors import ApiError, from_validation, invalid

Model = TypeVar("Model", bound=BaseModel)

DISCARDED_BODIES = 4
"""Of a body that is too large, so many times the limit are read and dropped before the answer: a client that
still writes when the connection closes would see a reset, and not the 413."""


async def read(request: Request, model: type[Model], limit: int) -> Model:
    """The body as `model`. Raises ApiError 400, 413 or 415."""
    return validated(parse(await read_bytes(request, limit)), model)


def validated(data: object, model: type[Model]) -> Model:
    """`data` as `model`. Raises ApiError 400 about the first field that is wrong."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise from_validation(error, model) from error


async def read_bytes(request: Request, limit: int) -> bytes:
    """At most `limit` bytes; whether the client announces their number or not."""
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise ApiError(415, f"Content-Type must be application/json, not {media_type!r}", code="unsupported_media_type")
    announced = request.headers.get("content-length", "")
    keeps = not (announced.isdecimal() and int(announced) > limit)
    body, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        keeps = keeps and size <= limit
        if keeps:
            body += chunk
        elif size > DISCARDED_BODIES * limit:
            break
    if not keeps:
        raise _too_large(limit)
    return bytes(body)


def parse(body: bytes) -> object:
    """The JSON value in `body`. Its parser refuses lone surrogates and nesting deeper than about 200."""
    try:
        return from_json(body, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise invalid(f"The body is not valid JSON: {error}", code="invalid_json") from error


def _too_large(limit: int) -> ApiError:
    # Some of the body may be unread, so the connection cannot be used again.
    return ApiError(413, f"The body exceeds {limit} bytes", code="request_too_large", headers={"Connection": "close"})
