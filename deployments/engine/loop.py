"""The step thread: schedule, execute, postprocess, again.

Requests and aborts are handed over under a lock and take effect at the next step. The thread
owns the scheduler, the batch builder and the outboxes; nothing else touches them.
"""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cluster.channel import Address
from cluster.experts.client import ExpertsNotReady, ExpertsUnavailable
from deployments.engine.batch import BatchBuilder, StepBatch
from deployments.engine.images import EncodedImages, check_images
from deployments.engine.mailing import Mailing
from deployments.engine.metrics import EngineMetrics
from deployments.engine.model_thread import ModelThread
from deployments.engine.postprocess import Outputs, postprocess
from deployments.engine.readiness import Readiness
from deployments.engine.request import (
    EngineRequest,
    EngineStopping,
    ExpertsGone,
    FrontLost,
    QueueFull,
    StepFailed,
    VisionDescription,
)
from deployments.engine.scheduler import Plan, Scheduler
from deployments.engine.sequence import Sequence, Status
from model.datatypes import PagedBatch
from model.sampling import SampledTokens, SamplingBatch

logger = logging.getLogger(__name__)

FAILURES_UNTIL_UNHEALTHY = 3

Done = Callable[[Exception | None], None]
"""Called once, from the step thread, when a request has ended or failed."""


class Executor(Protocol):
    """What computes a step: a `cluster.shard.Shard`, or a fake."""

    def step(self, batch: PagedBatch, sampling: SamplingBatch) -> SampledTokens: ...

    def encode_image(self, tiles: NDArray[np.uint8]) -> Tensor: ...

    def probe(self) -> None: ...


@dataclass
class _Request:
    request: EngineRequest
    done: Done
    choices: list[Sequence] = field(default_factory=list)


class StepLoop:
    """Runs the requests of one engine. `submit` and `abort` may be called from any thread."""

    def __init__(
        self,
        executor: Executor,
        scheduler: Scheduler,
        metrics: EngineMetrics,
        max_waiting_requests: int,
        vision: VisionDescription | None = None,
        image_cache_bytes: int = 0,
    ) -> None:
        self._executor, self._scheduler, self._metrics = executor, scheduler, metrics
        self._max_waiting, self._vision = max_waiting_requests, vision
        self._images = EncodedImages(executor.encode_image, image_cache_bytes, metrics)
        self._batches, self._mailing = BatchBuilder(scheduler.limits), Mailing(metrics.engine)
        self._wake = threading.Condition()
        self._arriving: list[_Request] = []
        self._aborting: list[str] = []
        self._lost_fronts: list[Address] = []
        self._readiness = Readiness(self._probe)
        self._requests: dict[str, _Request] = {}
        self._stopping = False
        self._consecutive_failures = 0
        self._was_idle = True
        self._finish_interval, self._last_finish = 1.0, time.monotonic()
        self._ended: Future[None] | None = None

    def start(self, thread: ModelThread) -> None:
        """Runs on `thread` until `stop`."""
        self._ended = thread.submit(self._run)

    def stop(self) -> None:
        """Ends after the step under way; requests that are left fail."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._ended is not None:
            wait([self._ended])

    @property
    def error(self) -> str | None:
        """What is wrong, if this engine can no longer work."""
        if self._ended is None or self._ended.done():
            return "the step thread is not running"
        if self._stopping:
            return "it is stopping"
        if self._consecutive_failures >= FAILURES_UNTIL_UNHEALTHY:
            return f"the last {self._consecutive_failures} steps failed"
        return None

    def submit(self, request: EngineRequest, done: Done) -> None:
        """Queues `request`. Raises QueueFull, RequestTooLong, EngineStopping, or ValueError: an id in use, images
        that do not fit."""
        self._scheduler.check(request)
        check_images(request, self._vision)
        with self._wake:
            if self._stopping:
                raise EngineStopping("the engine is shutting down")
            if request.request_id in self._requests:
                raise ValueError(f"request id {request.request_id!r} is in use")
            if not request.outputs:
                self._check_queue()
            self._requests[request.request_id] = arriving = _Request(request, done)
            self._arriving.append(arriving)
            self._wake.notify()

    @property
    def fronts(self) -> set[Address]:
        """Where requests that are not done came from."""
        return {entry.request.reply_to for entry in list(self._requests.values())}

    def abort(self, request_id: str) -> None:
        """Drops a request before the next step; unknown ones are ignored. Its `done` is not called."""
        with self._wake:
            self._aborting.append(request_id)
            self._wake.notify()

    def lose_front(self, front: Address) -> None:
        """Fails the requests of a front that cannot be reached, before the next step."""
        with self._wake:
            self._lost_fronts.append(front)
            self._wake.notify()

    def probe(self) -> Future[None]:
        """Answered between two steps: its exception tells which rank or experts do not answer."""
        with self._wake:
            if self.error is not None:
                raise EngineStopping(self.error)
            asked = self._readiness.ask()
            self._wake.notify()
        return asked

    def _check_queue(self) -> None:
        waiting = sum(not entry.choices or entry.choices[0].is_unstarted for entry in list(self._requests.values()))
        free = self._scheduler.max_running - len(self._scheduler.running)
        if waiting >= self._max_waiting + max(free, 0):
            raise QueueFull(waiting, min(max(1.0, self._finish_interval * waiting / 2), 60.0))

    def _run(self) -> None:
        while self._wait_for_work():
            self._step_or_fail()
        self._fail(list(self._requests.values()), EngineStopping("the engine shut down before the request was done"))
        self._readiness.refuse(EngineStopping("the engine is shutting down"))
        self._mailing.close()

    def _wait_for_work(self) -> bool:
        """Takes what was handed over; sleeps when there is nothing to do. False when it is time to stop."""
        with self._wake:
            while not (self._stopping or self._handed_over or self._has_sequences()):
                self._check_idle()
                self._wake.wait()
            arriving, self._arriving = self._arriving, []
            aborting, self._aborting = self._aborting, []
            lost, self._lost_fronts = self._lost_fronts, []
        for entry in arriving:
            self._admit(entry)
        for request_id in aborting:
            self._drop(request_id)
        for front in set(lost):
            self._fail_front(front)
        self._readiness.answer()
        return not self._stopping

    @property
    def _handed_over(self) -> bool:
        return bool(self._arriving or self._aborting or self._lost_fronts or self._readiness.is_asked)

    def _probe(self) -> None:
        try:
            self._executor.probe()
        except (ExpertsUnavailable, ExpertsNotReady) as error:
            raise ExpertsGone(str(error)) from None

    def _fail_front(self, front: Address) -> None:
        waiting = [entry for entry in self._requests.values() if entry.request.reply_to == front]
        if waiting:
            logger.warning("front at %s cannot be reached: its %d requests end", front.endpoint, len(waiting))
            self._fail(waiting, FrontLost(f"no connection to the front at {front.endpoint}"))

    def _has_sequences(self) -> bool:
        return bool(self._scheduler.running or self._scheduler.waiting)

    def _admit(self, entry: _Request) -> None:
        try:
            entry.choices = self._scheduler.add(entry.request)
            self._metrics.images.inc(len(entry.request.images))
        except Exception as error:
            self._fail([entry], error)

    def _drop(self, request_id: str) -> _Request | None:
        entry = self._requests.pop(request_id, None)
        if entry is not None:
            self._scheduler.remove(entry.choices)
        return entry

    def _step_or_fail(self) -> None:
        plan: Plan = {}
        try:
            plan = self._scheduler.schedule()
            if plan:
                self._was_idle = False
                self._step(plan)
            self._consecutive_failures = 0
        except (ExpertsUnavailable, ExpertsNotReady) as error:  # a new engine would find them no better
            self._fail_step(plan, ExpertsGone(str(error)))
        except Exception as error:
            self._consecutive_failures += 1
            self._fail_step(plan, StepFailed(f"the engine failed in a step: {type(error).__name__}: {error}"))

    def _fail_step(self, plan: Plan, error: Exception) -> None:
        """To be called where an exception is handled."""
        self._metrics.failed_steps.inc()
        ids = {sequence.request.request_id for sequence in plan}
        admitted = [entry for entry in list(self._requests.values()) if entry.choices]
        concerned = [entry for entry in admitted if entry.request.request_id in ids or not plan]
        logger.exception("A step failed, and with it %d of %d requests", len(concerned), len(self._requests))
        self._fail(concerned, error)

    def _step(self, plan: Plan) -> None:
        begun = time.perf_counter()
        images = self._images.needed(plan)
        encoded = time.perf_counter()
        step = self._batches.build(plan, images)
        for sequence in plan:
            if not sequence.started:
                self._metrics.started(sequence)
        built = time.perf_counter()
        sampled = self._executor.step(step.paged, step.sampling)
        executed = time.perf_counter()
        self._finish(step, postprocess(self._scheduler, plan, step, sampled))
        overhead = time.perf_counter() - executed + built - encoded
        self._metrics.step(len(step.paged.tokens), executed - built + encoded - begun, overhead)

    def _finish(self, step: StepBatch, outputs: Outputs) -> None:
        self._mailing.send(outputs.deltas)
        self._metrics.generation_tokens.inc(len(step.sampled))
        for sequence in outputs.first:
            self._metrics.first_output(sequence)
        for sequence in outputs.finished:
            self._metrics.finished(sequence)
            # The last choices of a request may end in the same step: its first one here ends it.
            entry = self._requests.get(sequence.request.request_id)
            if entry is not None and all(choice.status is Status.FINISHED for choice in entry.choices):
                del self._requests[sequence.request.request_id]
                self._count_finish()
                entry.done(None)

    def _fail(self, entries: list[_Request], error: Exception) -> None:
        for entry in entries:
            self._drop(entry.request.request_id)
            entry.done(error)

    def _count_finish(self) -> None:
        now = time.monotonic()
        self._finish_interval += 0.1 * (min(now - self._last_finish, 60.0) - self._finish_interval)
        self._last_finish = now

    def _check_idle(self) -> None:
        """Nothing runs, so nothing may hold a block. A leak is logged, and would be a bug."""
        if not self._was_idle and (leaks := self._scheduler.pool.leaks()):
            logger.error("No request runs, but %d KV blocks are held: %s", len(leaks), leaks[:10])
        self._was_idle = True
