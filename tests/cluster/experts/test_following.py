"""The thread that follows the directory: it lives on, whatever tables come."""

import asyncio
import os
import time
from collections.abc import Sequence

from cluster.experts.following import CONNECT_SECONDS, RETRY_SECONDS, Following
from cluster.experts.table import Report, RoutingTable, ServerAddress

NOBODY = ServerAddress("a", "here", "unix:moray-nobody-listens", "tcp:127.0.0.1:1", b"")


class Tables:
    """A directory that has published `tables` and then nothing."""

    def __init__(self, tables: Sequence[RoutingTable]) -> None:
        self.left = list(tables)

    async def report(self, report: Report) -> None:
        raise NotImplementedError

    async def next_table(self, epoch: int) -> RoutingTable | None:
        if not self.left:
            await asyncio.sleep(60)
        return self.left.pop(0)


def epoch_after(tables: Sequence[RoutingTable], seconds: float) -> int:
    """Of the last table that was handed over in so many seconds."""
    wake = os.eventfd(0, os.EFD_NONBLOCK)
    following = Following(Tables(tables), "here", wake)
    following.start()
    time.sleep(seconds)
    update = following.take()
    following.stop()
    os.close(wake)
    return update.table.epoch if update and update.table else 0


def test_a_server_that_is_named_again_while_it_is_connected_to_ends_nothing():
    tables = [RoutingTable(1, (NOBODY,), {}), RoutingTable(2, (), {}), RoutingTable(3, (NOBODY,), {})]
    assert epoch_after(tables, CONNECT_SECONDS + 1.0) == 3


def test_a_table_that_cannot_be_used_does_not_end_following():
    broken = RoutingTable(1, None, {})  # type: ignore[arg-type]
    assert epoch_after([broken, RoutingTable(2, (), {})], RETRY_SECONDS + 1.0) == 2
