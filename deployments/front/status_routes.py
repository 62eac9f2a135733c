"""What there is and how it is: models, health, version, metrics."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from fastapi import APIRouter, FastAPI
from fastapi.responses import Response

from deployments.front.errors import ApiError
from deployments.front.openapi import responses
from deployments.front.protocol.response import Health, ModelCard, ModelList, Version
from deployments.front.served_model import ServedModel
from deployments.metrics import CONTENT_TYPE
from deployments.status import ClusterStatus


def find(models: Mapping[str, ServedModel], model: str) -> ServedModel:
    """Raises ApiError 404 for a model that is not served."""
    if model not in models:
        served = ", ".join(models)
        raise ApiError(404, f"The model {model[:100]!r} does not exist; served: {served}", "model", "model_not_found")
    return models[model]


class StatusRoutes:
    """Everything that generates nothing."""

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        render_metrics: Callable[[], Awaitable[bytes]],
        cluster: Callable[[], Awaitable[ClusterStatus]],
        version: str,
    ) -> None:
        self._models = models
        self._render_metrics = render_metrics
        self._cluster = cluster
        self._version = version

    def add_models_to(self, api: APIRouter) -> None:
        """Registers what needs an API key, if there are any."""
        api.get("/v1/models", responses=responses(None, 401, 500), tags=["models"])(self.list_models)
        api.get("/cluster", responses=responses(None, 401, 500), tags=["status"])(self.cluster)
        # A model's id may hold no slash, but what a client asks for may.
        path = "/v1/models/{model:path}"
        api.get(path, responses=responses(None, 401, 404, 500), tags=["models"])(self.retrieve_model)

    def add_to(self, app: FastAPI) -> None:
        """Registers what is open to all."""
        app.get("/health", responses=responses(None, 503), tags=["status"])(self.health)
        app.get("/version", tags=["status"])(self.version)
        documented = responses(None, 500)
        documented[200] = {"description": "Prometheus text", "content": {"text/plain": {"schema": {"type": "string"}}}}
        app.get("/metrics", response_class=Response, responses=documented, tags=["status"])(self.metrics)

    async def list_models(self) -> ModelList:
        """All served models."""
        return ModelList(data=[model.card for model in self._models.values()])

    async def retrieve_model(self, model: str) -> ModelCard:
        """One served model."""
        return find(self._models, model).card

    async def health(self) -> Health:
        """200 when every engine's ranks and experts have answered a probe, else 503 with those that did not."""
        models = list(self._models.values())
        faults = await asyncio.gather(*(model.engine.faults() for model in models))
        told = [f"{model.id}: {fault}" for model, found in zip(models, faults, strict=True) for fault in found]
        if told:
            raise ApiError(503, f"Not every engine is ready: {'; '.join(told)}", code="engine_unavailable")
        return Health(status="ok", models=[model.id for model in models])

    async def cluster(self) -> ClusterStatus:
        """The application's processes: fronts, engines and their ranks, expert servers."""
        return await self._cluster()

    async def version(self) -> Version:
        """Of the server."""
        return Version(version=self._version)

    async def metrics(self) -> Response:
        """Of every front and every engine."""
        return Response(await self._render_metrics(), headers={"content-type": CONTENT_TYPE})
