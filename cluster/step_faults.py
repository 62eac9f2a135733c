"""How the ranks of a group give up a step together, when one of them finds no server for its experts.

Ranks that left a step at different places could never go on. So every collective takes place: the rank whose experts
are gone goes on with zeros and asks nobody any more, and after the step all ranks hear of it. What such a step
computed is for nobody, what it wrote into the KV cache as well.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from cluster.experts.client import ExpertsNotReady, ExpertsUnavailable
from cluster.parallel import World
from model.model import ExpertsOfLayer
from model.moe import Experts, PendingExperts, Ready

MESSAGE_BYTES = 512


class SharedExperts(Experts, Protocol):
    """Experts whose rows the ranks divide among themselves, by what each knows of all."""

    def forget(self) -> None:
        """What it knows: a rank that gave a step up has missed some."""


class StepFaults:
    """What has gone wrong on this rank since the ranks agreed last."""

    def __init__(self, world: World) -> None:
        self._world, self._is_guarding = world, False
        self._guarded: list[SharedExperts] = []
        self.fault = ""

    def guard(self, experts: Callable[[int], SharedExperts]) -> ExpertsOfLayer:
        """The same experts, whose failures are noted here instead of raised."""
        self._is_guarding = True

        def of_layer(layer: int) -> Experts:
            self._guarded.append(experts(layer))
            return _Guarded(self._guarded[-1], self)

        return of_layer

    def agreed(self) -> str:
        """The fault of the first rank that has one, on every rank; empty when none has. A collective operation.

        Costs one exchange a step, and none where no experts are guarded.
        """
        if not self._is_guarding:
            return ""
        world, fault, self.fault = self._world, self.fault, ""
        failed = torch.zeros(world.layout.size)
        failed[world.rank] = bool(fault)
        ranks = world.frames.all_reduce(failed).nonzero().flatten().tolist()
        if not ranks:
            return ""
        for experts in self._guarded:
            experts.forget()
        encoded = fault.encode()[:MESSAGE_BYTES].ljust(MESSAGE_BYTES)
        message = world.frames.broadcast(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), ranks[0])
        return message.numpy().tobytes().decode(errors="replace").strip()


class _Guarded:
    def __init__(self, experts: Experts, faults: StepFaults) -> None:
        self.is_whole = experts.is_whole
        self._experts, self._faults = experts, faults

    def submit(self, x_kD: Tensor, experts_k: Tensor, routed_k: Tensor | None = None) -> PendingExperts:
        if not self._faults.fault:
            try:
                return _Pending(self._experts.submit(x_kD, experts_k, routed_k), x_kD, self._faults)
            except ExpertsNotReady as error:
                self._faults.fault = str(error)
        return Ready(torch.zeros_like(x_kD))


class _Pending:
    def __init__(self, pending: PendingExperts, x_kD: Tensor, faults: StepFaults) -> None:
        self._pending, self._x_kD, self._faults = pending, x_kD, faults

    def wait(self) -> Tensor:
        try:
            return self._pending.wait()
        except ExpertsUnavailable as error:
            self._faults.fault = str(error)
            return torch.zeros_like(self._x_kD)
