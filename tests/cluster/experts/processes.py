"""Real expert servers and a real directory, each a process, without Ray: what failure tests kill."""

import asyncio
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.managers import BaseManager
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from cluster.experts.client import ExpertClient
from cluster.experts.directory import Directory
from cluster.experts.membership import Membership
from cluster.experts.server import ExpertServer
from cluster.experts.table import Assignment, Report, RoutingTable
from cluster.experts.weights import HeldExperts
from model.checkpoint import open_checkpoint

HOST = "127.0.0.1"
_CONTEXT = multiprocessing.get_context("forkserver")  # imports torch once, not once a server
_CONTEXT.set_forkserver_preload(["cluster.experts.membership", "cluster.experts.client"])


class _Manager(BaseManager):
    """Tests only: it pickles."""


_Manager.register("directory")


class ManagedDirectory:
    """The directory behind a manager's socket. Connects anew when that is replaced."""

    def __init__(self, socket: str) -> None:
        self._socket = socket

    def call(self, name: str, *arguments: object) -> object:
        manager = _Manager(self._socket, b"tests")
        manager.connect()
        return getattr(manager.directory(), name)(*arguments)

    async def report(self, report: Report) -> Assignment:
        return await asyncio.to_thread(self.call, "report", report)

    async def next_table(self, epoch: int) -> RoutingTable | None:
        table = await asyncio.to_thread(self.call, "await_table", epoch)
        assert table is None or isinstance(table, RoutingTable)
        return table


class Cluster:
    """Processes of one model's experts; `stop` ends those that were started here."""

    def __init__(self, folder: Path, model: Path, dtype: str = "bfloat16", copies: int = 2, delay: str = "") -> None:
        self.folder, self.model, self.dtype, self.copies = folder, model, dtype, copies
        self.socket = str(folder / "d")
        self.directory = ManagedDirectory(self.socket)
        self.directory_process: BaseProcess | None = None
        self.servers: dict[str, BaseProcess] = {}
        self.clients: list[ExpertClient] = []

    def start(self, num_servers: int) -> None:
        self.start_directory()
        for number in range(num_servers):
            self.add(f"s{number}")

    def start_directory(self) -> None:
        Path(self.socket).unlink(missing_ok=True)
        self.directory_process = self._spawn("directory", run_directory, self.socket, str(self.model), self.copies)
        deadline = time.monotonic() + 30
        while not Path(self.socket).exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def add(self, name: str, slow_file: str = "", load_seconds: float = 0.0) -> None:
        """slow_file: while it exists, every answer waits for the seconds in it. load_seconds: for each expert."""
        self.servers[name] = self._spawn(
            name, run_server, self.socket, str(self.model), self.dtype, name, slow_file, load_seconds
        )

    def client(self, **options: float) -> ExpertClient:
        client = ExpertClient(self.directory, HOST, **options)
        self.clients.append(client)
        client.start()
        client.wait_until_ready(60)
        return client

    def signal(self, name: str, number: int) -> None:
        os.kill(int(self.servers[name].pid or 0), number)

    def kill(self, name: str) -> None:
        process = self.servers.pop(name)
        process.kill()
        process.join(10)

    def table(self) -> RoutingTable:
        """The one that is published, as soon as there is one."""
        deadline = time.monotonic() + 30
        while (table := self.directory.call("get_table")) is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert isinstance(table, RoutingTable)
        return table

    def wait_for_copies(self, copies: int, timeout: float, among: set[str]) -> float:
        """Seconds until every expert has so many copies on the servers `among`."""
        begun = time.monotonic()
        while time.monotonic() - begun < timeout:
            table = self.table()
            good = {place for place, server in enumerate(table.servers) if server.id in among}
            held = [sum(place in good for place in of) for experts in table.layers.values() for of in experts]
            if min(held) >= copies and {server.id for server in table.servers} <= among:
                return time.monotonic() - begun
            time.sleep(0.05)
        raise AssertionError(f"not {copies} copies of everything on {among} after {timeout} s: {sorted(held)[:8]}")

    def stop(self) -> None:
        for client in self.clients:
            client.close()
        for process in [*self.servers.values(), *([self.directory_process] if self.directory_process else [])]:
            process.kill()
            process.join(10)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def _spawn(self, name: str, run: Callable[..., None], *arguments: object) -> BaseProcess:
        process = _CONTEXT.Process(target=_run, args=(str(self.folder / f"{name}.log"), run, arguments), daemon=True)
        process.start()
        return process


def _run(log: str, run: Callable[..., None], arguments: tuple[object, ...]) -> None:
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    run(*arguments)


class Served(Directory):
    """With methods in the place of a property, which managers do not pass on."""

    def get_table(self) -> RoutingTable | None:
        return self.table

    def await_table(self, epoch: int, seconds: float = 0.3) -> RoutingTable | None:
        """The first other than `epoch` within so many seconds. Sleeps here, since every call costs a connection."""
        deadline = time.monotonic() + seconds
        while (self.table is None or self.table.epoch == epoch) and time.monotonic() < deadline:
            time.sleep(0.01)
        return None if self.table is None or self.table.epoch == epoch else self.table


def run_directory(socket: str, model: str, copies: int) -> None:
    args = open_checkpoint(model).args
    layers = [layer for layer in range(args.n_layers) if args.is_moe_layer(layer)]
    directory = Served(layers, args.moe_args.num_experts, copies)

    def tick() -> None:
        while True:
            directory.tick()
            time.sleep(0.1)

    threading.Thread(target=tick, daemon=True).start()
    _Manager.register("directory", callable=lambda: directory)
    _Manager(socket, b"tests").get_server().serve_forever()


def run_server(socket: str, model: str, dtype: str, name: str, slow_file: str, load_seconds: float) -> None:
    torch.set_num_threads(1)
    experts = HeldExperts(open_checkpoint(model), getattr(torch, dtype))
    slow_down(experts, slow_file, load_seconds)
    server = ExpertServer(experts, HOST, name)
    server.start()
    membership = Membership(server, experts, ManagedDirectory(socket))
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=leave, args=(membership, server)).start())
    membership.start()
    while server.is_alive:
        time.sleep(0.1)


def slow_down(experts: HeldExperts, slow_file: str, load_seconds: float) -> None:
    compute, load = experts.compute, experts.load
    if slow_file:
        experts.are_packed = False  # else the server does not call `compute`

    def compute_slowly(*arguments: object) -> torch.Tensor:
        if slow_file and Path(slow_file).exists():
            time.sleep(float(Path(slow_file).read_text() or "0"))
        return compute(*arguments)

    def load_slowly(unit: tuple[int, int]) -> None:
        time.sleep(load_seconds)
        load(unit)

    experts.compute, experts.load = compute_slowly, load_slowly  # type: ignore[method-assign]


def leave(membership: Membership, server: ExpertServer) -> None:
    membership.leave(30)
    server.stop()
