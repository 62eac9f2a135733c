"""What a front answers before it knows its models: how it is, and nothing else yet.

Engines may load for minutes. Until one of each model has answered, `GET /health` is 503 and tells what is waited for,
`GET /cluster` shows it, and requests wait for as long as they would for an engine that was lost.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Depends, FastAPI

from cluster.starting import Phase
from deployments.config import FrontConfig
from deployments.front.auth import bearer_check
from deployments.front.boundary import on_api_error
from deployments.front.errors import ApiError
from deployments.status import ClusterStatus

App = Callable[[Any, Any, Any], Awaitable[None]]
"""Of ASGI."""
EARLY = ("/health", "/cluster")


class Opening:
    """The ASGI app of a front, from before `open` to after it.

    early: answers EARLY. patience_s: for other requests to wait; then they are answered 503.
    """

    def __init__(self, early: App, patience_s: float) -> None:
        self._early, self._patience = early, patience_s
        self._app: asyncio.Future[App] = asyncio.get_running_loop().create_future()

    def open(self, app: App) -> None:
        """From now on `app` answers all."""
        self._app.set_result(app)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await (await self._app_for(scope))(scope, receive, send)

    async def _app_for(self, scope: Any) -> App:
        if self._app.done():
            return self._app.result()
        if scope["type"] != "http" or scope["path"].removeprefix(scope.get("root_path", "")) in EARLY:
            return self._early
        done, _ = await asyncio.wait([self._app], timeout=self._patience)
        return self._app.result() if done else _is_starting


def early_api(
    config: FrontConfig, cluster: Callable[[], Awaitable[ClusterStatus]], phases: Callable[[], list[Phase]]
) -> FastAPI:
    """What can be told so early."""
    app = FastAPI(openapi_url=None)
    app.add_exception_handler(ApiError, on_api_error)
    guarded = APIRouter(dependencies=[Depends(bearer_check(config.api_keys))])

    async def health() -> None:
        told = "; ".join(f"{phase.process}: {phase.phase}" for phase in await asyncio.to_thread(phases))
        raise _starting(told or "no process tells what it waits for")

    app.get("/health")(health)
    guarded.get("/cluster")(cluster)
    app.include_router(guarded)
    return app


def _starting(why: str) -> ApiError:
    return ApiError(503, f"The server is starting: {why}", code="server_starting", headers={"Retry-After": "5"})


async def _is_starting(scope: Any, receive: Any, send: Any) -> None:
    await _starting("see GET /cluster").response(scope, receive, send)
