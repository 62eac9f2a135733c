"""Follows the directory, and opens connections to expert servers, in a thread of its own."""

import asyncio
import logging
import os
import threading
from dataclasses import dataclass, field

from cluster.experts.table import DirectoryClient, RoutingTable, ServerAddress
from cluster.streams import Connection, Disconnected, connect

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 1.0
RETRY_SECONDS = 0.25
TABLE_TIMEOUT_SECONDS = 30.0
"""The directory answers long polls well before."""


@dataclass
class Update:
    """What is new: a table, connections by server."""

    table: RoutingTable | None = None
    connections: list[tuple[str, Connection]] = field(default_factory=list)


class Following:
    """wake: an eventfd, written when there is something to `take`."""

    def __init__(self, directory: DirectoryClient, host: str, wake: int) -> None:
        self._directory, self._host, self._wake = directory, host, wake
        self._lock = threading.Lock()
        self._update: Update | None = None
        self._addresses: dict[str, ServerAddress] = {}
        self._connecting: set[str] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="expert-table", daemon=True)
        self._stopped: asyncio.Event | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> bool:
        """Whether the thread has ended, and writes to `wake` no more."""
        if self._loop is not None and self._stopped is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopped.set)
            self._thread.join(5)
        return not self._thread.is_alive()

    def take(self) -> Update | None:
        """What has changed since the last call. Costs nothing when nothing has."""
        if self._update is None:
            return None
        with self._lock:
            update, self._update = self._update, None
        return update

    def reconnect(self, server: str) -> None:
        """The connection to `server` is lost: a new one comes when it answers, while a table names it."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._begin, server)

    async def _run(self) -> None:
        self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
        following = asyncio.create_task(self._follow())
        await self._stopped.wait()
        for task in [following, *self._tasks]:
            task.cancel()

    async def _follow(self) -> None:
        epoch, failing = 0, False
        while True:
            try:
                async with asyncio.timeout(TABLE_TIMEOUT_SECONDS):
                    table = await self._directory.next_table(epoch)
                if table is not None and table.epoch != epoch:
                    await self._adopt(table)
                    epoch = table.epoch
                failing = False
            except Exception as error:
                if not failing:
                    logger.warning(
                        "no table from the directory, the last one stays: %s: %s", type(error).__name__, error
                    )
                failing = True
                await asyncio.sleep(RETRY_SECONDS)

    async def _adopt(self, table: RoutingTable) -> None:
        """Hands the table over when its new servers have answered, or have had time to."""
        new = [server for server in table.servers if server.id not in self._addresses]
        self._addresses = {server.id: server for server in table.servers}
        if tasks := [task for server in new if (task := self._begin(server.id)) is not None]:
            await asyncio.wait(tasks, timeout=CONNECT_SECONDS)
        self._hand_over(Update(table))

    def _begin(self, server: str) -> "asyncio.Task[None] | None":
        if server in self._connecting:
            return None
        self._connecting.add(server)
        task = asyncio.get_running_loop().create_task(self._connect(server))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _connect(self, server: str) -> None:
        try:
            while (address := self._addresses.get(server)) is not None:
                try:
                    endpoint = address.endpoint(self._host)
                    connection = await asyncio.to_thread(connect, endpoint, address.key, CONNECT_SECONDS)
                except Disconnected as error:
                    logger.debug("expert server %s does not answer: %s", server, error)
                    await asyncio.sleep(RETRY_SECONDS)
                    continue
                self._hand_over(Update(connections=[(server, connection)]))
                return
        finally:
            self._connecting.discard(server)

    def _hand_over(self, update: Update) -> None:
        with self._lock:
            if self._update is None:
                self._update = update
            else:
                self._update.table = update.table or self._update.table
                self._update.connections += update.connections
        os.eventfd_write(self._wake, 1)
