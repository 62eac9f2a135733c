"""Sends the deltas of a step to the fronts they are for: one message for each front."""

import time

import msgspec

from cluster.channel import Address, Outbox
from deployments.engine.request import StepMessage, TokenDelta

IDLE_SECONDS = 60.0
"""An outbox unused for so long is closed; its front may be gone."""


class Mailing:
    """Outboxes by front. One thread owns it. engine: the replica's id, which goes with every message."""

    def __init__(self, engine: str) -> None:
        self._engine = engine
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
                outbox = self._outboxes[address.name] = Outbox(address)
            self._used[address.name] = now
            outbox.send(self._encode(StepMessage(of_front, self._engine)))
        if now > self._next_sweep:
            self._close_idle(now)

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
