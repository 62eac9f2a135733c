"""What the ranks of a group agree on after each step: whether it failed, and what expert servers were given.

Ranks that left a step at different places could never go on. So every collective takes place: the rank that finds no
server for its experts goes on with zeros and asks nobody any more, and after the step all ranks hear of it. What such
a step computed is for nobody, what it wrote into the KV cache as well.

The ranks of a stage deal the rows of their experts alike as long as they think that servers were given the same
(experts/routes.py). What one rank sees of servers, another may see a step later: each takes over what the first thinks.
"""

from array import array
from collections.abc import Callable
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from cluster.experts.client import ExpertsNotReady, ExpertsUnavailable
from cluster.parallel import World
from model.model import ExpertsOfLayer
from model.moe import Experts, PendingExperts, Ready

MESSAGE_BYTES = 512
STEPS = 32
"""From one time that ranks take over what servers were given to the next."""


class SharedExperts(Experts, Protocol):
    """Experts of one layer, whose rows the ranks of a stage divide among themselves."""

    @property
    def given(self) -> "array[float]":
        """Rows that each server was given of late."""


class Agreement:
    """One rank's part in it."""

    def __init__(self, world: World) -> None:
        self._world, self._is_guarding, self._steps = world, False, 0
        self._guarded: list[SharedExperts] = []
        self.fault = ""
        """What has gone wrong on this rank since the ranks agreed last."""

    def guard(self, experts: Callable[[int], SharedExperts]) -> ExpertsOfLayer:
        """The same experts, whose failures are noted here instead of raised."""
        self._is_guarding = True

        def of_layer(layer: int) -> Experts:
            self._guarded.append(experts(layer))
            return _Guarded(self._guarded[-1], self)

        return of_layer

    def reach(self) -> str:
        """The fault of the first rank that has one, on every rank; empty when none has. A collective operation.

        Costs one exchange a step, and none where no experts are guarded.
        """
        if not self._is_guarding:
            return ""
        world, fault, self.fault = self._world, self.fault, ""
        self._steps += 1
        if self._steps % STEPS == 0:
            self._take_over()
        failed = torch.zeros(world.layout.size)
        failed[world.rank] = bool(fault)
        ranks = world.frames.all_reduce(failed).nonzero().flatten().tolist()
        if not ranks:
            return ""
        encoded = fault.encode()[:MESSAGE_BYTES].ljust(MESSAGE_BYTES)
        message = world.frames.broadcast(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), ranks[0])
        return message.numpy().tobytes().decode(errors="replace").strip()

    def _take_over(self) -> None:
        """What the first rank of this stage thinks that servers were given; not while it knows of more or fewer."""
        own = torch.tensor([rows for experts in self._guarded for rows in experts.given], dtype=torch.float64)
        size = int(self._world.stage.broadcast(torch.tensor([len(own)]), 0))
        if len(own) != size:
            self._world.stage.broadcast(torch.empty(size, dtype=torch.float64), 0)
            return
        rows = iter(self._world.stage.broadcast(own, 0).tolist())
        for experts in self._guarded:
            experts.given[:] = array("d", islice(rows, len(experts.given)))


class _Guarded:
    def __init__(self, experts: Experts, agreement: Agreement) -> None:
        self.is_whole = experts.is_whole
        self._experts, self._agreement = experts, agreement

    def submit(self, x_kD: Tensor, experts_k: Tensor, routed_k: Tensor | None = None) -> PendingExperts:
        if not self._agreement.fault:
            try:
                return _Pending(self._experts.submit(x_kD, experts_k, routed_k), x_kD, self._agreement)
            except ExpertsNotReady as error:
                self._agreement.fault = str(error)
        return Ready(torch.zeros_like(x_kD))


class _Pending:
    def __init__(self, pending: PendingExperts, x_kD: Tensor, agreement: Agreement) -> None:
        self._pending, self._x_kD, self._agreement = pending, x_kD, agreement

    def wait(self, give_up: float | None = None) -> Tensor:
        try:
            return self._pending.wait(give_up)
        except ExpertsUnavailable as error:
            self._agreement.fault = str(error)
            return torch.zeros_like(self._x_kD)
