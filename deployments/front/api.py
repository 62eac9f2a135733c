"""The HTTP API as a FastAPI app. It knows engines as `EngineClient`s only, and nothing of Serve."""

from collections.abc import Awaitable, Callable, Mapping

from fastapi import APIRouter, Depends, FastAPI
from starlette.exceptions import HTTPException

from deployments.config import FrontConfig
from deployments.front.auth import bearer_check
from deployments.front.boundary import ErrorBoundary, on_api_error, on_http_error
from deployments.front.errors import ApiError
from deployments.front.generating_routes import GeneratingRoutes
from deployments.front.metrics import FrontMetrics
from deployments.front.openapi import describe
from deployments.front.served_model import ServedModel
from deployments.front.status_routes import StatusRoutes
from deployments.front.token_routes import TokenRoutes
from deployments.status import ClusterStatus

DESCRIPTION = "The OpenAI API with vLLM's extra fields. What is not supported is refused with an error that names it."


def build_api(
    models: Mapping[str, ServedModel],
    config: FrontConfig,
    metrics: FrontMetrics,
    render_metrics: Callable[[], Awaitable[bytes]],
    cluster: Callable[[], Awaitable[ClusterStatus]],
    version: str,
) -> FastAPI:
    """All endpoints.

    models: by id, the `model` of requests.
    metrics: where requests are counted.
    render_metrics: gives the Prometheus exposition of the whole application.
    cluster: tells of its processes.
    """
    app = FastAPI(title="Moray", version=version, description=DESCRIPTION, redirect_slashes=False)
    app.add_middleware(ErrorBoundary)
    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(HTTPException, on_http_error)
    api = APIRouter(dependencies=[Depends(bearer_check(config.api_keys))])
    GeneratingRoutes(models, config, metrics, version).add_to(api)
    TokenRoutes(models, config).add_to(api)
    status = StatusRoutes(models, render_metrics, cluster, version)
    status.add_models_to(api)
    app.include_router(api)
    status.add_to(app)
    describe(app, models, config)
    return app
