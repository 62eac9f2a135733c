"""The front as a Serve deployment: opens tokenizers, meets the engines, and serves the API.

The app is built inside each replica (`__serve_build_asgi_app__`), so nothing of it is pickled.
It is served the same way by Serve's proxy and, under HAProxy, by the replica's own HTTP server.
Admission is the engines' affair, which answer in the API's own error shape; so Serve's limits are out of the way.
"""

import asyncio
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster import processes
from deployments.broadcast import ask_all
from deployments.config import AppConfig, ImageConfig, ModelConfig
from deployments.engine.request import EngineDescription, VisionDescription
from deployments.front.api import build_api
from deployments.front.chat_template import ChatTemplate
from deployments.front.images import FetchPolicy, ImageFetcher, ImageReader, ImageSettings, ImageTokens
from deployments.front.mailbox import Mailbox
from deployments.front.metrics import FrontMetrics
from deployments.front.remote_engine import RemoteEngine
from deployments.front.roster import roster_of
from deployments.front.served_model import ServedModel
from deployments.front.tokenizer import Tokenizer, open_tokenizer
from deployments.metrics import Snapshot, render, snapshot
from deployments.status import ClusterStatus, FrontStatus, this_replica

UNLIMITED = 1_000_000


@serve.deployment(name="front", max_ongoing_requests=UNLIMITED, max_queued_requests=-1)
@serve.ingress()
class Front:
    """One replica. engines: handles by model id. experts, directories: of those models that have expert servers."""

    def __init__(
        self,
        config: AppConfig,
        engines: Mapping[str, DeploymentHandle],
        experts: Sequence[DeploymentHandle] = (),
        directories: Sequence[DeploymentHandle] = (),
    ) -> None:
        self._config = config
        self._engines, self._experts, self._directories = engines, experts, directories
        self._mailbox = Mailbox(ray.util.get_node_ip_address())
        self._context = serve.get_replica_context()
        self._fronts = serve.get_deployment_handle(self._context.deployment, self._context.app_name)

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Called once by Serve, after the constructor; the replica is ready when it returns."""
        served = await asyncio.gather(*(self._meet(model) for model in self._config.models))
        processes.serve_first()
        models = {model.id: model for model in served}
        longest = max(model.max_model_len for model in served)
        self._metrics = FrontMetrics(self._context.replica_tag, longest)
        return build_api(
            models, self._config.front, self._metrics, self._render_metrics, self._cluster, version("moray-serve")
        )

    async def metrics(self) -> Snapshot:
        """What this replica measured; see deployments/metrics.py."""
        return snapshot(self._metrics.registry)

    async def status(self) -> FrontStatus:
        return FrontStatus(**this_replica())

    async def _meet(self, model: ModelConfig) -> ServedModel:
        """Waits until an engine of `model` answers, while the tokenizer is opened."""
        handle = self._engines[model.id]
        opening = asyncio.to_thread(_open, model)
        (tokenizer, template), description = await asyncio.gather(opening, _describe(handle))
        return ServedModel(
            id=model.id,
            tokenizer=tokenizer,
            engine=RemoteEngine(
                model.id,
                handle,
                self._mailbox,
                roster_of(f"engine-{model.id}"),
                self._config.front.heartbeat_timeout_s,
                self._config.front.failover_timeout_s,
            ),
            max_model_len=description.max_model_len,
            vocab_size=description.vocab_size,
            chat_template=template,
            images=_reader(model, description.vision, tokenizer, self._config.front.images),
            root=model.path,
        )

    async def _render_metrics(self) -> bytes:
        handles = [self._fronts, *self._engines.values(), *self._experts, *self._directories]
        gathered = await asyncio.gather(*(ask_all(handle, "metrics") for handle in handles))
        return render([snapshot for answers in gathered for snapshot in _answers(answers)])

    async def _cluster(self) -> ClusterStatus:
        engines = list(self._engines.values())
        handles = [self._fronts, *engines, *self._experts]
        fronts, *others = await asyncio.gather(*(ask_all(handle, "status") for handle in handles))
        missing = [len(asked) - len(_answers(asked)) for asked in (fronts, *others)]
        names = (handle.deployment_name for handle in handles)
        return ClusterStatus(
            fronts=_answers(fronts),
            engines=[status for asked in others[: len(engines)] for status in _answers(asked)],
            experts=[status for asked in others[len(engines) :] for status in _answers(asked)],
            silent={name: count for name, count in zip(names, missing, strict=True) if count},
        )


async def _describe(handle: DeploymentHandle) -> EngineDescription:
    return await handle.describe.remote()


def _answers(answers: list[Any]) -> list[Any]:
    return [answer for answer in answers if not isinstance(answer, BaseException)]


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
