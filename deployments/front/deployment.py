"""The front as a Serve deployment: opens tokenizers, meets the engines, and serves the API.

The app is built inside each replica (`__serve_build_asgi_app__`), so nothing of it is pickled.
It is served the same way by Serve's proxy and, under HAProxy, by the replica's own HTTP server.
Admission is the engines' affair, which answer in the API's own error shape; so Serve's limits are out of the way.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster import processes
from cluster.starting import phases
from deployments import room
from deployments.broadcast import ask_all
from deployments.config import AppConfig, ImageConfig, ModelConfig
from deployments.engine.request import EngineDescription, VisionDescription
from deployments.front.api import build_api
from deployments.front.chat_template import ChatTemplate
from deployments.front.images import FetchPolicy, ImageFetcher, ImageReader, ImageSettings, ImageTokens
from deployments.front.mailbox import Mailbox
from deployments.front.metrics import FrontMetrics
from deployments.front.opening import Opening, early_api
from deployments.front.remote_engine import RemoteEngine
from deployments.front.roster import roster_of
from deployments.front.served_model import ServedModel
from deployments.front.tokenizer import Tokenizer, open_tokenizer
from deployments.metrics import Snapshot, render, snapshot
from deployments.status import ClusterStatus, FrontStatus, StartingStatus, starting_replica, this_replica

logger = logging.getLogger(__name__)

UNLIMITED = 1_000_000
ROOM_SECONDS = 5.0
"""Between two looks whether engines that have not begun to start have room."""
MEET_SECONDS = 5.0
"""For engines that serve already to answer a new front, before Serve sends it requests."""


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
        self._config, self._starting = config, starting_replica()
        self._engines, self._experts, self._directories = engines, experts, directories
        self._metrics: FrontMetrics | None = None
        self._mailbox = Mailbox(ray.util.get_node_ip_address())
        self._context = serve.get_replica_context()
        self._fronts = serve.get_deployment_handle(self._context.deployment, self._context.app_name)

    async def __serve_build_asgi_app__(self) -> Opening:
        """Called once by Serve, after the constructor; the replica is there when it returns.

        It waits for engines that serve already, not for those that start.
        """
        config = self._config.front
        app = Opening(early_api(config, self._cluster, phases), config.failover_timeout_s)
        logger.info("opening tokenizers")
        opened = await asyncio.gather(*(asyncio.to_thread(_open, model) for model in self._config.models))
        self._opening = asyncio.create_task(self._open(app, opened))
        done, _ = await asyncio.wait([self._opening], timeout=MEET_SECONDS)
        for task in done:
            task.result()
        return app

    async def _open(self, app: Opening, opened: Sequence[tuple[Tokenizer, ChatTemplate | None]]) -> None:
        """Returns when an engine of every model has answered, and all is served."""
        logger.info("waiting for engines of %s", ", ".join(model.id for model in self._config.models))
        telling = asyncio.create_task(self._tell_who_has_no_room())
        try:
            served = await asyncio.gather(*map(self._meet, self._config.models, opened))
        finally:
            telling.cancel()
        models = {model.id: model for model in served}
        self._metrics = metrics = FrontMetrics(self._context.replica_tag, max(model.max_model_len for model in served))
        processes.serve_first()
        self._starting.ready()
        app.open(
            build_api(models, self._config.front, metrics, self._render_metrics, self._cluster, version("moray-serve"))
        )

    async def _tell_who_has_no_room(self) -> None:
        while True:
            await asyncio.sleep(ROOM_SECONDS)
            has_room = {phase.process.partition("/")[0] for phase in await asyncio.to_thread(phases)}
            for line in await asyncio.to_thread(room.waiting_in_vain, self._config.models, has_room):
                logger.warning(line)

    def check_health(self) -> None:
        """Serve calls it; raises what kept this replica from serving."""
        if self._opening.done():
            self._opening.result()

    async def metrics(self) -> Snapshot:
        """What this replica measured; see deployments/metrics.py."""
        return "" if self._metrics is None else snapshot(self._metrics.registry)

    async def status(self) -> FrontStatus:
        return FrontStatus(**this_replica())

    async def _meet(self, model: ModelConfig, opened: tuple[Tokenizer, ChatTemplate | None]) -> ServedModel:
        """Waits until an engine of `model` answers."""
        handle, (tokenizer, template) = self._engines[model.id], opened
        description: EngineDescription = await handle.describe.remote()
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
        kinds = {
            "fronts": [self._fronts],
            "engines": list(self._engines.values()),
            "experts": self._experts,
            "directories": self._directories,
        }
        handles = [(kind, handle) for kind, of_kind in kinds.items() for handle in of_kind]
        asked = await asyncio.gather(*(ask_all(handle, "status") for _, handle in handles))
        told: dict[str, list[Any]] = {kind: [] for kind in kinds}
        silent: dict[str, int] = {}
        for (kind, handle), answers in zip(handles, asked, strict=True):
            told[kind] += _answers(answers)
            if missing := len(answers) - len(_answers(answers)):
                silent[handle.deployment_name] = missing
        starting = [StartingStatus.of(phase) for phase in await asyncio.to_thread(phases)]
        return ClusterStatus(**told, silent=silent, starting=starting)


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
