"""One model over many ranks: rank 0 leads and samples, the others follow its frames.

The group lives and dies as one. A rank that dies is noticed within a fraction of a second by
every other of its host; one that freezes, or is on a host that cannot be reached, by whoever waits
for it and gets no sign of life for `rank_timeout_s`. One that computes for long gives them through shared
memory; gloo knows none, so that between hosts a step must not take longer than that. Then followers
end their processes, and `on_lost` of the leader is called, which should do the same. Experts on servers that do not
answer cost a step, not the group (agreement.py).
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster import processes
from cluster.agreement import Agreement
from cluster.experts.client import ClientCounts, ExpertsUnavailable
from cluster.frames import Frame, Kind, receive, send
from cluster.parallel import World
from cluster.shard import Shard
from cluster.shared_memory import RankLost
from cluster.watch import Watch
from model.datatypes import PagedBatch
from model.sampling import SampledTokens, SamplingBatch, sample

logger = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
"""An idle group says this often that it lives."""
LOADING_SECONDS = 3600.0
"""Ranks of one model may be so far apart in loading; a dead one is noticed all the same."""

OnLost = Callable[[str], None]
"""Called once, with what happened, from any thread."""


class ShardGroup:
    """The leader's side: what the engine steps, once `load` has returned. `stop` must be called in the end.

    rank_timeout_s: how long a rank may give no sign of life. on_lost: called when the group is lost after `load`.
    follower_counts: what the others' clients of expert servers have counted, by rank.
    """

    def __init__(
        self,
        world: World,
        rank_timeout_s: float,
        on_lost: OnLost,
        follower_counts: Callable[[], dict[int, ClientCounts]] = dict,
    ) -> None:
        self._world, self._rank_timeout_s, self._on_lost = world, rank_timeout_s, on_lost
        self.follower_counts = follower_counts
        self._turn, self._stopping, self._last = threading.Lock(), threading.Event(), time.monotonic()
        self._losing, self._is_ready, self._reason = threading.Lock(), False, ""
        world.set_deadline(LOADING_SECONDS)
        self._watch = Watch(world.neighbours(), lambda rank, pid: self.lose(f"rank {rank} (pid {pid}) has died"))

    def load(self, options: dict[str, Any]) -> None:
        """Loads this rank's shard while the followers load theirs; to be called in the thread that will step.

        options: of `Shard`. Raises what it raises, and RankLost when a follower did not get there.
        """
        try:
            self._shard, self._agreement = _loaded(self._world, options)
        except RankLost as error:
            raise RankLost(self._reason or str(error)) from error
        self._world.set_deadline(self._rank_timeout_s)
        self.args, self.num_blocks = self._shard.args, self._shard.num_blocks
        self.kv_chunks, self.num_kv_tokens = self._shard.kv_chunks, self._shard.num_kv_tokens
        self.max_model_len = self._shard.max_model_len
        with self._losing:
            if self._reason:
                raise RankLost(self._reason)
            self._is_ready = True
        threading.Thread(target=self._beat, name="beat-ranks", daemon=True).start()

    def lose(self, reason: str) -> None:
        """Ends the group, if it is not ending already. From any thread."""
        with self._losing:
            if self._stopping.is_set():
                return
            self._stopping.set()
            self._reason, is_ready = reason, self._is_ready
        self._world.abort()
        self._watch.kill()
        logger.critical("the group of %d ranks ends: %s", self._world.layout.size, reason)
        if is_ready:
            self._on_lost(reason)

    def step(self, batch: PagedBatch, sampling: SamplingBatch) -> SampledTokens:
        """As `Shard.step`. Raises RankLost, and ExpertsUnavailable, after which the next step may be another."""
        return sample(self.logits(batch), sampling)

    def logits(self, batch: PagedBatch) -> Tensor:
        """As `Shard.logits`."""
        with self._together(Frame(Kind.STEP, batch)):
            logits = self._shard.logits(batch)
            fault = self._agreement.reach()
        if fault:
            raise ExpertsUnavailable(fault)
        return logits

    def encode_image(self, tiles: NDArray[np.uint8]) -> Tensor:
        """As `Shard.encode_image`."""
        with self._together(Frame(Kind.IMAGE, tiles=torch.tensor(tiles))):
            return self._shard.encode_image(tiles)

    def probe(self) -> None:
        """Every rank answers, and to each of them every expert. Raises RankLost, and ExpertsUnavailable, after which
        all goes on."""
        with self._together(Frame(Kind.PROBE)):
            fault = _probe(self._world, self._shard, self._agreement)
        if fault:
            raise ExpertsUnavailable(fault)

    @property
    def processes(self) -> list[tuple[int, str]]:
        """Pid and host's address of every rank."""
        return list(zip(self._world.pids, self._world.layout.addresses, strict=True))

    def stop(self) -> None:
        """Ends the followers. Safe to call twice."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        with self._turn, contextlib.suppress(RankLost):
            self._watch.stop()
            send(Frame(Kind.STOP), self._world.frames)

    @contextlib.contextmanager
    def _together(self, frame: Frame) -> Iterator[None]:
        """Whatever goes wrong inside leaves ranks at different places, so it ends the group."""
        with self._turn:
            try:
                send(frame, self._world.frames)
                yield
            except BaseException as error:
                self.lose(f"{type(error).__name__}: {error}")
                raise
            self._last = time.monotonic()

    def _beat(self) -> None:
        while not self._stopping.wait(BEAT_SECONDS / 4):
            if time.monotonic() - self._last > BEAT_SECONDS and not self._stopping.is_set():
                with contextlib.suppress(RankLost), self._together(Frame(Kind.BEAT)):
                    pass


def follow(
    world: World, options: dict[str, Any], rank_timeout_s: float, on_ready: Callable[[], None] = lambda: None
) -> None:
    """A follower's whole life, in the thread that computes. Returns when the leader stops; ends the process when
    the group is lost; raises what `Shard` raises. on_ready: called once all ranks have loaded."""
    world.set_deadline(LOADING_SECONDS)
    watch = Watch(world.neighbours(), lambda rank, pid: _end(world, f"rank {rank} (pid {pid}) has died"))
    try:
        shard, agreement = _loaded(world, options)
    except RankLost as error:
        _end(world, str(error))
    on_ready()
    # The leader beats once a second; it may be late, and so may be its beat.
    world.set_deadline(rank_timeout_s + BEAT_SECONDS)
    try:
        while (frame := receive(world.frames)).kind is not Kind.STOP:
            _obey(world, shard, agreement, frame)
    except Exception as error:  # whatever it is, this rank is no longer where the others are
        _end(world, f"{type(error).__name__}: {error}")
    watch.stop()


def _loaded(world: World, options: dict[str, Any]) -> tuple[Shard, Agreement]:
    agreement, experts = Agreement(world), options.get("experts")
    if experts is not None:
        options = options | {"experts": lambda: agreement.guard(experts())}
    shard = Shard(**options, ranks_on_host=len(world.layout.neighbours(world.rank)))
    logger.info("rank %d is loaded, waiting for the others", world.rank)
    world.frames.barrier()
    processes.serve_first()
    if fault := agreement.reach():
        raise ExpertsUnavailable(fault)
    return shard, agreement


def _probe(world: World, shard: Shard, agreement: Agreement) -> str:
    """What some rank found, on every rank."""
    shard.probe()
    world.frames.barrier()
    return agreement.reach()


def _obey(world: World, shard: Shard, agreement: Agreement, frame: Frame) -> None:
    if frame.kind is Kind.PROBE:
        _probe(world, shard, agreement)
    elif frame.batch is not None:
        shard.logits(frame.batch)
        agreement.reach()
    elif frame.tiles is not None and shard.sees:
        shard.encode_image(frame.tiles.numpy())


def _end(world: World, reason: str) -> NoReturn:
    logger.critical("rank %d ends with its group: %s", world.rank, reason)
    logging.shutdown()
    os._exit(1)
