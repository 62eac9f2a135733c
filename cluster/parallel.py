"""The ranks of one model as process groups: fairscale's, over shared memory, gloo or NCCL.

Ranks are numbered stage by stage; those of one stage share its layers. What each pair of
groups runs over follows from the hosts of its ranks (`backend`), the same on every rank.
"""

import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import psutil
import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize
from torch import Tensor

from cluster import process_group, shared_memory
from cluster.process_group import SharedMemoryGroup
from cluster.shared_memory import RankLost, SharedMemory
from model.parallel import initialize_model_parallel

STORE_PORT_BACKLOG = 128


@dataclass(frozen=True)
class Layout:
    """How a model is spread: pipeline stages of `tensor` ranks each.

    hosts: an id for the host of every rank. addresses: theirs in the network; empty where nobody asks.
    """

    tensor: int
    stages: int
    hosts: tuple[str, ...]
    addresses: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.hosts) != self.size:
            raise ValueError(f"{self.stages} stages of {self.tensor} ranks need {self.size} hosts, not {self.hosts}")

    @property
    def size(self) -> int:
        return self.tensor * self.stages

    def neighbours(self, rank: int) -> list[int]:
        """The ranks on the host of `rank`, itself included."""
        return [other for other, host in enumerate(self.hosts) if host == self.hosts[rank]]

    def tensor_groups(self) -> list[range]:
        return [range(stage * self.tensor, (stage + 1) * self.tensor) for stage in range(self.stages)]

    def pipeline_groups(self) -> list[range]:
        return [range(place, self.size, self.tensor) for place in range(self.tensor)]


def backend(layout: Layout, groups: Sequence[Sequence[int]], device: str = "cpu") -> str:
    """What torch.distributed calls the backend of `groups`, which must be one for all of them.

    "shm" when no group leaves its host, "gloo" otherwise; "nccl" for GPUs, which this project has
    never run on.
    """
    if device == "cuda":
        return "nccl"
    local = all(len({layout.hosts[rank] for rank in group}) == 1 for group in groups)
    return process_group.BACKEND if local and shared_memory.available() else "gloo"


class Rendezvous:
    """Where the ranks of one group find each other. Made by rank 0; `address` is for the others.

    On one host it is a file without a name, like the memory that the ranks will share; between
    hosts a port of rank 0's address. host_address: None for one host.
    """

    def __init__(self, host_address: str | None = None) -> None:
        self._socket: socket.socket | None = None
        if host_address is None:
            self._descriptor = os.memfd_create("moray-rendezvous", os.MFD_CLOEXEC)
            self.address = f"/proc/{os.getpid()}/fd/{self._descriptor}"
            return
        family = socket.AF_INET6 if ":" in host_address else socket.AF_INET
        self._socket = socket.create_server((host_address, 0), family=family, backlog=STORE_PORT_BACKLOG)
        self.address = f"tcp://{host_address}|{self._socket.getsockname()[1]}"

    def store(self, size: int, timeout: timedelta) -> dist.Store:
        """Rank 0's own."""
        if self._socket is None:
            return open_store(self.address, size, timeout)
        host, port = _host_and_port(self.address)
        # torch would listen on every interface; this socket listens on one.
        return dist.TCPStore(
            host, port, size, is_master=True, timeout=timeout, wait_for_workers=False,
            master_listen_fd=self._socket.detach(),
        )  # fmt: skip

    def close(self) -> None:
        """When all have come."""
        if self._socket is None:
            os.close(self._descriptor)


def open_store(address: str, size: int, timeout: timedelta) -> dist.Store:
    """The store of another process's `Rendezvous`."""
    if not address.startswith("tcp://"):
        return dist.FileStore(address, size)
    host, port = _host_and_port(address)
    return dist.TCPStore(host, port, size, is_master=False, timeout=timeout, wait_for_workers=False)


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.removeprefix("tcp://").rpartition("|")
    return host, int(port)


class Transport(Protocol):
    """What carries messages between the ranks of a group. root: a place in it."""

    def broadcast(self, x: Tensor, root: int) -> Tensor: ...
    def all_reduce(self, x: Tensor) -> Tensor: ...
    def barrier(self) -> None: ...
    def set_deadline(self, seconds: float) -> None: ...
    def abort(self) -> None: ...


class TorchTransport:
    """The same over a process group of torch's own (gloo, NCCL). A wait that is under way ends at its deadline, also
    when the other rank only computes for that long."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self._aborted = group, False

    def broadcast(self, x: Tensor, root: int) -> Tensor:
        with self._answered():
            dist.broadcast(x, group=self._group, group_src=root)
        return x

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks, in x."""
        with self._answered():
            dist.all_reduce(x, group=self._group)
        return x

    def barrier(self) -> None:
        self.broadcast(torch.zeros(1), 0)

    def set_deadline(self, seconds: float) -> None:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), self._group)

    def abort(self) -> None:
        self._aborted = True

    @contextlib.contextmanager
    def _answered(self) -> Iterator[None]:
        if self._aborted:
            raise RankLost("the group was aborted")
        try:
            yield
        except RuntimeError as error:
            raise RankLost(f"a rank did not answer: {error}") from error


class World:
    """This process as one rank of a model. A process is in one world at most, for good.

    Returns when every rank has come; raises RankLost when they do not within `start_seconds`.
    """

    def __init__(
        self, layout: Layout, rank: int, rendezvous: Rendezvous | str, start_seconds: float, address: str | None = None
    ) -> None:
        """rendezvous: rank 0's own, or its address. address: of this host, for gloo; None for loopback."""
        self.layout, self.rank = layout, rank
        timeout = timedelta(seconds=start_seconds)
        whole = backend(layout, [range(layout.size)])
        process_group.register()
        if whole == "gloo":
            os.environ["GLOO_SOCKET_IFNAME"] = _interface(address or "127.0.0.1")
        if isinstance(rendezvous, str):
            store = open_store(rendezvous, layout.size, timeout)
        else:
            store = rendezvous.store(layout.size, timeout)
        store.set_timeout(timeout)
        try:
            dist.init_process_group(whole, store=store, rank=rank, world_size=layout.size, timeout=timeout)
            initialize_model_parallel(
                layout.tensor,
                layout.stages,
                model_parallel_backend=backend(layout, layout.tensor_groups()),
                pipeline_backend=backend(layout, layout.pipeline_groups()),
                ddp_backend=backend(layout, [[each] for each in range(layout.size)]),
            )
        except RuntimeError as error:
            raise RankLost(f"the ranks did not all come within {start_seconds:g} s: {error}") from error
        groups = [
            dist.group.WORLD, initialize.get_model_parallel_group(), initialize.get_pipeline_parallel_group(),
        ]  # fmt: skip
        self._transports = [_transport(group) for group in groups]
        self.frames, self.stage = self._transports[:2]
        """To all ranks, and to those that share the layers of this one."""
        self.pids = self._exchange_pids()
        if isinstance(rendezvous, Rendezvous):
            rendezvous.close()

    def _exchange_pids(self) -> list[int]:
        """Of all ranks."""
        pids = [torch.zeros(1, dtype=torch.int64) for _ in range(self.layout.size)]
        dist.all_gather(pids, torch.tensor([os.getpid()]))
        return [int(pid) for pid in pids]

    def neighbours(self) -> dict[int, int]:
        """Pids of the other ranks on this host, by rank."""
        return {rank: self.pids[rank] for rank in self.layout.neighbours(self.rank) if rank != self.rank}

    def set_deadline(self, seconds: float) -> None:
        """How long this rank waits for another from now on; in shared memory, for a sign of life from it."""
        for transport in self._transports:
            transport.set_deadline(seconds)

    def abort(self) -> None:
        """Ends the waits of this process, now and later. From any thread."""
        for transport in self._transports:
            transport.abort()


def _transport(group: dist.ProcessGroup) -> SharedMemory | TorchTransport:
    return group.memory if isinstance(group, SharedMemoryGroup) else TorchTransport(group)


def _interface(address: str) -> str:
    """The network interface that has `address`: gloo would take the one the host's name stands for."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address for each in addresses):
            return name
    raise ValueError(f"no network interface of this host has the address {address}")
