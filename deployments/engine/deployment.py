"""The engine as a Serve deployment: one replica runs one model, on one shard or on a group of them.

`deployments.app` makes the class a deployment and sets its options.
"""

import asyncio
import functools
import gc
import logging
import os
import time
from typing import Any

from ray.serve.handle import DeploymentHandle

from cluster import processes
from cluster.experts.client import ClientCounts, ExpertClient
from cluster.ranks import start_group
from cluster.shard import Shard
from cluster.shard_group import ShardGroup
from deployments.config import ModelConfig
from deployments.engine.blocks import BlockPool
from deployments.engine.heartbeat import Heartbeat
from deployments.engine.loop import StepLoop
from deployments.engine.metrics import EngineMetrics
from deployments.engine.model_thread import ModelThread
from deployments.engine.request import EngineDescription, EngineRequest, VisionDescription
from deployments.engine.scheduler import Limits, Scheduler
from deployments.experts.directory import DirectoryHandle
from deployments.experts.metrics import ClientCollector
from deployments.experts.remote import RemoteExperts
from deployments.metrics import Snapshot
from deployments.status import EngineStatus, RankStatus, starting_replica, this_replica
from model.args import VisionArgs

logger = logging.getLogger(__name__)


class Engine:
    """Loads `config`'s model and generates with it.

    directory: of its expert servers, if it has any. shard: used instead of loading one (tests).
    Raises ValueError at construction when the model or its KV cache do not fit, ExpertsNotReady when
    expert servers do not hold every expert in time.
    """

    def __init__(
        self,
        config: ModelConfig,
        directory: DeploymentHandle | None = None,
        shard: Shard | ShardGroup | None = None,
    ) -> None:
        begun, starting = time.monotonic(), starting_replica()
        thread = ModelThread()
        self._experts = experts = _experts(config, directory)
        self._shard = shard or thread.submit(lambda: _load(config, experts, starting.process)).result()
        engine = config.engine
        limits = Limits(
            max_num_seqs=engine.max_num_seqs,
            max_num_batched_tokens=engine.max_num_batched_tokens,
            max_model_len=self._shard.max_model_len,
            block_size=engine.block_size,
            enable_prefix_caching=engine.enable_prefix_caching,
            kv_chunks=self._shard.kv_chunks,
        )
        scheduler = Scheduler(BlockPool(self._shard.num_blocks), limits)
        self._description = EngineDescription(
            model_id=config.id,
            max_model_len=limits.max_model_len,
            vocab_size=self._shard.args.vocab_size,
            dtype=engine.dtype,
            block_size=limits.block_size,
            num_kv_tokens=self._shard.num_kv_tokens,
            max_num_seqs=scheduler.max_running,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            vision=_vision(self._shard.args.vision_args),
        )
        self._replica, self._scheduler = this_replica(), scheduler
        self._metrics = EngineMetrics(config.id, self._replica["replica_id"], scheduler)
        if experts is not None and experts.client is not None:
            counts = functools.partial(_expert_counts, experts.client, self._shard)
            self._metrics.registry.register(ClientCollector(counts, config.id, self._metrics.engine))
        self._loop = StepLoop(
            self._shard, scheduler, self._metrics, engine.max_waiting_requests,
            self._description.vision, engine.image_cache_memory,
        )  # fmt: skip
        # The model's objects stay: the collector need not walk them, which would pause a step.
        gc.collect()
        gc.freeze()
        processes.serve_first()
        self._loop.start(thread)
        loop = self._loop  # the heartbeat's thread must not keep this object alive
        self._heartbeat = Heartbeat(self._replica["replica_id"], lambda: loop.fronts, loop.lose_front)
        logger.info("engine of %s ready in %.1f s", config.id, time.monotonic() - begun)
        starting.ready()

    async def generate(self, request: EngineRequest) -> None:
        """Returns when the request is done; its tokens go to `request.reply_to`. Cancelling aborts it.

        Raises QueueFull, RequestTooLong, StepFailed, ExpertsGone, FrontLost or EngineStopping.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        self._loop.submit(request, lambda error: _call_soon(loop, future, error))
        try:
            await future
        except asyncio.CancelledError:
            self._loop.abort(request.request_id)
            raise

    def describe(self) -> EngineDescription:
        return self._description

    def status(self) -> EngineStatus:
        scheduler = self._scheduler
        return EngineStatus(
            **self._replica,
            model=self._description.model_id,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            kv_cache_usage=scheduler.pool.usage,
            ranks=_ranks(self._shard),
            expert_epoch=self._experts.client.epoch if self._experts and self._experts.client else None,
        )

    def metrics(self) -> Snapshot:
        return self._metrics.snapshot()

    def check_health(self) -> None:
        """Serve calls it; raises when the replica should be replaced."""
        if self._loop.error is not None:
            raise RuntimeError(f"engine of {self._description.model_id}: {self._loop.error}")

    async def check_ready(self) -> None:
        """Raises what keeps some rank or expert from answering; the engine may be well all the same."""
        await asyncio.wrap_future(self._loop.probe())

    def stop(self) -> None:
        """Ends the step thread, and the other ranks; unfinished requests fail."""
        self._loop.stop()
        if isinstance(self._shard, ShardGroup):
            self._shard.stop()
        self._heartbeat.stop()
        if self._experts is not None and self._experts.client is not None:
            self._experts.client.close()

    def __del__(self) -> None:
        loop = getattr(self, "_loop", None)
        if loop is not None and loop.error is None:
            loop.stop()
        if heartbeat := getattr(self, "_heartbeat", None):
            heartbeat.stop()
        if isinstance(shard := getattr(self, "_shard", None), ShardGroup):
            shard.stop()


def _experts(config: ModelConfig, directory: DeploymentHandle | None) -> RemoteExperts | None:
    if directory is None or config.experts is None:
        return None
    return RemoteExperts(DirectoryHandle(directory), config.experts)


def _expert_counts(client: ExpertClient, shard: Shard | ShardGroup) -> dict[int, ClientCounts]:
    """By rank."""
    others = shard.follower_counts() if isinstance(shard, ShardGroup) else {}
    return {0: client.snapshot(), **others}


def _load(config: ModelConfig, experts: RemoteExperts | None, process: str) -> Shard | ShardGroup:
    engine = config.engine
    options: dict[str, Any] = dict(
        path=config.path,
        dtype=engine.dtype,
        block_size=engine.block_size,
        max_num_seqs=engine.max_num_seqs,
        max_model_len=engine.max_model_len,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        kv_cache_memory=engine.kv_cache_memory,
        kv_cache_memory_share=engine.kv_cache_memory_share,
        num_threads=engine.num_threads,
        experts=experts,
    )
    if not engine.bundles:
        return Shard(**options)
    return start_group(
        engine.tensor_parallel_size, engine.pipeline_parallel_size, options, engine.rank_timeout_s, _end_replica,
        process,
    )  # fmt: skip


def _end_replica(reason: str) -> None:
    """A group that has lost a rank ends whole: Serve sees the replica's process end, and starts another at once."""
    logger.critical("the replica ends: %s", reason)
    logging.shutdown()
    os._exit(1)


def _ranks(shard: Shard | ShardGroup) -> list[RankStatus]:
    if not isinstance(shard, ShardGroup):
        return []
    return [RankStatus(rank=rank, pid=pid, host=host) for rank, (pid, host) in enumerate(shard.processes)]


def _vision(args: VisionArgs | None) -> VisionDescription | None:
    if args is None:
        return None
    size = args.image_size
    if size.height != size.width:
        raise ValueError(f"tiles must be square to be served, the model's are {size.height} by {size.width}")
    return VisionDescription(size.width, args.tokens_per_tile)


def _call_soon(loop: asyncio.AbstractEventLoop, future: asyncio.Future[None], error: Exception | None) -> None:
    def settle() -> None:
        if future.done():
            return
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

    if not loop.is_closed():
        loop.call_soon_threadsafe(settle)
