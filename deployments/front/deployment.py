"""The front as a Serve deployment: opens tokenizers, meets the engines, and serves the API.

The app is built inside each replica (`__serve_build_asgi_app__`), so nothing of it is pickled.
It is served the same way by Serve's proxy and, under HAProxy, by the replica's own HTTP server.
Admission is the engines' affair, which answer in the API's own error shape; so Serve's limits are out of the way.
"""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.config import AppConfig, ImageConfig, ModelConfig
from deployments.engine.request import EngineDescription, VisionDescription
from deployments.front.api import build_api
from deployments.front.chat_template import ChatTemplate
from deployments.front.images import FetchPolicy, ImageFetcher, ImageReader, ImageSettings, ImageTokens
from deployments.front.mailbox import Mailbox
from deployments.front.metrics import FrontMetrics
from deployments.front.remote_engine import RemoteEngine
from deployments.front.served_model import ServedModel
from deployments.front.tokenizer import Tokenizer, open_tokenizer
from deployments.metrics import Snapshot, render, snapshot

UNLIMITED = 1_000_000
GATHER_SECONDS = 5.0
"""A replica that takes longer to tell its metrics is left out."""


@serve.deployment(name="front", max_ongoing_requests=UNLIMITED, max_queued_requests=-1)
@serve.ingress()
class Front:
    """One replica. `engines` are handles by model id."""

    def __init__(self, config: AppConfig, engines: Mapping[str, DeploymentHandle]) -> None:
        self._config = config
        self._engines = engines
        self._mailbox = Mailbox(ray.util.get_node_ip_address())
        self._context = serve.get_replica_context()
        self._fronts = serve.get_deployment_handle(self._context.deployment, self._context.app_name)

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Called once by Serve, after the constructor; the replica is ready when it returns."""
        served = await asyncio.gather(*(self._meet(model) for model in self._config.models))
        models = {model.id: model for model in served}
        longest = max(model.max_model_len for model in served)
        self._metrics = FrontMetrics(self._context.replica_tag, longest)
        return build_api(models, self._config.front, self._metrics, self._render_metrics, version("moray-serve"))

    async def metrics(self) -> Snapshot:
        """What this replica measured; see deployments/metrics.py."""
        return snapshot(self._metrics.registry)

    async def _meet(self, model: ModelConfig) -> ServedModel:
        """Waits until an engine of `model` answers, while the tokenizer is opened."""
        handle = self._engines[model.id]
        opening = asyncio.to_thread(_open, model)
        (tokenizer, template), description = await asyncio.gather(opening, _describe(handle))
        return ServedModel(
            id=model.id,
            tokenizer=tokenizer,
            engine=RemoteEngine(model.id, handle, self._mailbox),
            max_model_len=description.max_model_len,
            vocab_size=description.vocab_size,
            chat_template=template,
            images=_reader(model, description.vision, tokenizer, self._config.front.images),
            root=model.path,
        )

    async def _render_metrics(self) -> bytes:
        handles = [self._fronts, *self._engines.values()]
        gathered = await asyncio.gather(*(_gather(handle) for handle in handles))
        return render([snapshot for snapshots in gathered for snapshot in snapshots])


async def _describe(handle: DeploymentHandle) -> EngineDescription:
    return await handle.describe.remote()


async def _gather(handle: DeploymentHandle) -> list[Snapshot]:
    with suppress(TimeoutError):
        response = handle.broadcast("metrics")
        results = await response.results_async(timeout_s=GATHER_SECONDS, return_exceptions=True)
        return [result for result in results if not isinstance(result, Exception)]
    return []


def _open(model: ModelConfig) -> tuple[Tokenizer, ChatTemplate | None]:
    tokenizer = open_tokenizer(model.tokenizer or model.path)
    source = Path(model.chat_template).read_text() if model.chat_template else tokenizer.chat_template
    return tokenizer, ChatTemplate(source, tokenizer.special_tokens) if source else None


def _reader(
    model: ModelConfig, vision: VisionDescription | None, tokenizer: Tokenizer, config: ImageConfig
) -> ImageReader | None:
    """Raises ValueError if the tokenizer lacks the tokens of images."""
    if vision is None:
        return None
    settings = ImageSettings(
        vision.tile_size, vision.tokens_per_tile, model.max_image_tiles, config.max_bytes, config.max_pixels
    )
    policy = FetchPolicy(frozenset(config.allowed_hosts), config.fetch_timeout_s)
    return ImageReader(settings, ImageTokens.of(tokenizer), ImageFetcher(policy), config.max_per_request)
