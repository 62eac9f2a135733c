"""The directory of a model's experts as a Serve deployment, and how servers and engines reach it."""

import asyncio
import logging
from typing import Any

from prometheus_client import CollectorRegistry

from cluster import processes
from cluster.experts.directory import Directory
from cluster.experts.table import Assignment, Report, RoutingTable
from deployments.config import ModelConfig
from deployments.experts.metrics import DirectoryCollector
from deployments.metrics import Snapshot, snapshot
from deployments.status import DirectoryStatus, MemberStatus, starting_replica, this_replica
from model.checkpoint import local_path
from model.checkpoint.architecture import read_args
from model.checkpoint.hub import ARCHITECTURE_FILES

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.25
LONG_POLL_SECONDS = 10.0


class ExpertDirectory:
    """One replica; Serve starts another when it dies, which learns all from the servers' heartbeats.

    Raises ValueError when the model has no experts.
    """

    def __init__(self, config: ModelConfig) -> None:
        assert config.experts is not None
        starting = starting_replica()
        self._model, self._replica = config.id, this_replica()
        args = read_args(local_path(config.path, ARCHITECTURE_FILES))  # its host need not have the weights
        if args.moe_args is None:
            raise ValueError(f"model {config.id!r} has no experts: remove `experts` from its configuration")
        layers = [layer for layer in range(args.n_layers) if args.is_moe_layer(layer)]
        self._directory = Directory(layers, args.moe_args.num_experts, config.experts.copies)
        self._registry = CollectorRegistry()
        self._registry.register(DirectoryCollector(self._directory, config.id))
        self._published = asyncio.Event()
        self._ticking: asyncio.Task[None] | None = None
        processes.serve_first()
        starting.ready()

    async def report(self, report: Report) -> Assignment:
        """A server's heartbeat."""
        self._keep_ticking()
        assignment = self._directory.report(report)
        self._announce()
        return assignment

    async def next_table(self, epoch: int) -> RoutingTable | None:
        """The table once it is another than that of `epoch`, or None after a while.

        After a restart on a host whose clock is behind, another is not a later one.
        """
        self._keep_ticking()
        deadline = asyncio.get_running_loop().time() + LONG_POLL_SECONDS
        while (table := self._directory.table) is None or table.epoch == epoch:
            published = self._published
            try:
                async with asyncio.timeout_at(deadline):
                    await published.wait()
            except TimeoutError:
                return None
        return table

    def status(self) -> DirectoryStatus:
        table, copies = self._directory.table, self._directory.copies()
        return DirectoryStatus(
            **self._replica,
            model=self._model,
            epoch=table.epoch if table else None,
            servers=[
                MemberStatus(id=name, host=address.host, holds=held, assigned=meant, is_leaving=leaving)
                for name, (address, held, meant, leaving) in self._directory.members().items()
            ],
            fewest_copies=min(copies.values(), default=0),
            copies=[(layer, expert, count) for (layer, expert), count in sorted(copies.items())],
            imbalance={layer: round(value, 3) for layer, value in self._directory.imbalances().items()},
        )

    def metrics(self) -> Snapshot:
        return snapshot(self._registry)

    def check_health(self) -> None:
        if self._ticking is not None and self._ticking.done():
            raise RuntimeError(f"the directory no longer decides: {self._ticking.exception()!r}")

    def _keep_ticking(self) -> None:
        if self._ticking is None:
            self._ticking = asyncio.get_running_loop().create_task(self._tick())

    async def _tick(self) -> None:
        while True:
            await asyncio.to_thread(self._directory.tick)
            self._announce()
            await asyncio.sleep(TICK_SECONDS)

    def _announce(self) -> None:
        """Lets those who wait look at the table; those who have it wait on."""
        waiting, self._published = self._published, asyncio.Event()
        waiting.set()


class DirectoryHandle:
    """A `DirectoryClient` over a Serve handle. Belongs to the event loop that uses it first."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def report(self, report: Report) -> Assignment:
        assignment: Assignment = await self._handle.report.remote(report)
        return assignment

    async def next_table(self, epoch: int) -> RoutingTable | None:
        table: RoutingTable | None = await self._handle.next_table.remote(epoch)
        return table
