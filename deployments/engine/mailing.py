"""Sends the deltas of a step to the fronts they are for: one message for each front."""

import time

import msgspec

from cluster.channel import Address, Outbox
from deployments.engine.request import StepMessage, TokenDelta

IDLE_SECONDS = 60.0
"""An outbox unused for so long is closed; its front may be gone."""


class Mailing:
    """Outboxes by front. One thread owns it. engine: the replica's id, which goes with every message. is_watched: of
    the outboxes."""

    def __init__(self, engine: str, *, is_watched: bool = False) -> None:
        self._engine, self._is_watched = engine, is_watched
        self._outboxes: dict[str, Outbox] = {}
        self._used: dict[str, float] = {}
        self._encode = msgspec.msgpack.Encoder().encode
        self._next_sweep = 0.0

    def send(self, deltas: dict[Address, list[TokenDelta]]) -> None:
        """One message to each address."""
        now = time.monotonic()
        for address, of_front in deltas.items():
            outbox = self._outboxes.get(address.name)
            if outbox is None:
                outbox = self._outboxes[address.name] = Outbox(address, is_watched=self._is_watched)
            self._used[address.name] = now
            outbox.send(self._encode(StepMessage(of_front, self._engine)))
        if now > self._next_sweep:
            self._close_idle(now)

    def reaches(self, address: Address) -> bool:
        """Whether there is a connection to this front, which was sent something before. Of watched outboxes."""
        return self._outboxes[address.name].is_connected

    def close(self) -> None:
        for outbox in self._outboxes.values():
            outbox.close()
        self._outboxes.clear()
        self._used.clear()

    def _close_idle(self, now: float) -> None:
        self._next_sweep = now + IDLE_SECONDS
        for name in [name for name, used in self._used.items() if now - used > IDLE_SECONDS]:
            self._outboxes.pop(name).close()
            del self._used[name]
