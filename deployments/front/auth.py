"""Who may call the API."""

import secrets
from collections.abc import Callable, Sequence

from fastapi import Request

from deployments.front.errors import ApiError


def bearer_check(api_keys: Sequence[str]) -> Callable[[Request], None]:
    """A dependency that lets a request pass if it carries one of `api_keys`; without keys, any request.

    It raises ApiError 401.
    """
    keys = [key.encode() for key in api_keys]

    async def check(request: Request) -> None:
        if not keys:
            return
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        given = token.strip().encode("latin-1", "replace")
        # Every key is compared, each in constant time: the answer's timing tells nothing.
        matches = [secrets.compare_digest(given, key) for key in keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise ApiError(
                401,
                "Incorrect API key provided" if token else "You didn't provide an API key (Authorization: Bearer …)",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    return check  # type: ignore[return-value]
