"""Who holds which expert, as the directory publishes it, and what servers tell the directory."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

Unit = tuple[int, int]
"""A layer and an expert of it, both from 0."""


@dataclass(frozen=True)
class ServerAddress:
    """Where an expert server listens: `unix` for clients on its host, `tcp` for all others. key: shared secret."""

    id: str
    host: str
    unix: str
    tcp: str
    key: bytes = field(repr=False)

    def endpoint(self, host: str) -> str:
        """The one to use from `host`."""
        return self.unix if host == self.host else self.tcp


@dataclass(frozen=True)
class RoutingTable:
    """layers: layer -> of each of its experts the places in `servers` of those that hold it.

    A directory's later table has a larger epoch.
    """

    epoch: int
    servers: tuple[ServerAddress, ...]
    layers: Mapping[int, tuple[tuple[int, ...], ...]]

    def missing(self) -> list[Unit]:
        """Experts that no server holds."""
        return [
            (layer, expert)
            for layer, experts in self.layers.items()
            for expert, holders in enumerate(experts)
            if not holders
        ]


@dataclass(frozen=True)
class Report:
    """A server's heartbeat.

    rows: what each unit computed since the last report. max_units: how many units its memory holds, None for any
    number. is_leaving: it wants to end, and will when nothing is asked of it any more.
    """

    address: ServerAddress
    holds: frozenset[Unit]
    rows: Mapping[Unit, int]
    max_units: int | None = None
    is_leaving: bool = False


@dataclass(frozen=True)
class Assignment:
    """hold: what the server should hold. named: what the table of that epoch names it for, not to be dropped yet."""

    hold: frozenset[Unit]
    named: frozenset[Unit]
    epoch: int = 0


class DirectoryClient(Protocol):
    """The directory as servers and clients reach it. Any exception means: not now, try again."""

    async def report(self, report: Report) -> Assignment: ...

    async def next_table(self, epoch: int) -> RoutingTable | None:
        """The table as soon as it is another than that of `epoch`; None when that takes long: ask again."""
        ...
