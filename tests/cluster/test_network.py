"""Hosts in network namespaces: real links, cut and slowed. Skipped where the machine has none."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import network
from cluster.network import Host, Network

pytestmark = pytest.mark.skipif(network.why_not() is not None, reason=str(network.why_not()))

ECHO = """
import socket, sys
server = socket.create_server((sys.argv[1], 7000))
print("on", flush=True)
while True:
    connection, _ = server.accept()
    while data := connection.recv(65536):
        connection.sendall(data)
"""
ASK = """
import socket, sys, time
connection = socket.create_connection((sys.argv[1], 7000), timeout=5)
begin = time.monotonic()
connection.sendall(b"x" * int(sys.argv[2]))
received = 0
while received < int(sys.argv[2]):
    received += len(connection.recv(65536))
print(time.monotonic() - begin)
"""


started: list[subprocess.Popen[bytes]] = []


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    with Network(2) as made:
        yield made.hosts
    for process in started:
        process.wait(5)
    started.clear()


def start(host: Host, folder: Path, code: str, *arguments: str) -> tuple[subprocess.Popen[bytes], Path]:
    output = folder / f"{host.name}.out"
    with output.open("wb") as out:
        started.append(host.start([sys.executable, "-c", code, *arguments], os.environ, out))
    return started[-1], output


def echo(host: Host, folder: Path) -> subprocess.Popen[bytes]:
    process, output = start(host, folder, ECHO, host.address)
    while "on" not in output.read_text():
        assert process.poll() is None, output.read_text()
        time.sleep(0.02)
    return process


def round_trip(asking: Host, of: Host, folder: Path, size: int) -> float:
    """Seconds for `size` bytes there and back."""
    process, output = start(asking, folder, ASK, of.address, str(size))
    assert process.wait(30) == 0, output.read_text()
    return float(output.read_text())


def test_hosts_reach_each_other_and_this_machine_reaches_them(hosts: list[Host], tmp_path: Path) -> None:
    process = echo(hosts[0], tmp_path)
    assert round_trip(hosts[1], hosts[0], tmp_path, 1000) < 1
    with socket.create_connection((hosts[0].address, 7000), timeout=2) as connection:
        connection.sendall(b"hello")
        assert connection.recv(5) == b"hello"
    assert hosts[0].pids() == [process.pid]
    hosts[0].kill()
    assert process.wait(5) == -9


def test_a_cut_link_is_silent_until_it_is_restored(hosts: list[Host], tmp_path: Path) -> None:
    echo(hosts[0], tmp_path)
    with socket.create_connection((hosts[0].address, 7000), timeout=0.5) as connection:
        hosts[0].cut()
        connection.sendall(b"hello")
        with pytest.raises(TimeoutError):
            connection.recv(5)
        hosts[0].restore()
        connection.settimeout(10)
        assert connection.recv(5) == b"hello"


def test_a_slowed_link_is_as_slow_as_asked(hosts: list[Host], tmp_path: Path) -> None:
    echo(hosts[0], tmp_path)
    size, seconds = 200_000, 200_000 * 8 / 1e6
    hosts[0].slow("1mbit")
    assert round_trip(hosts[1], hosts[0], tmp_path, size) > seconds
    hosts[0].unslow()
    assert round_trip(hosts[1], hosts[0], tmp_path, size) < seconds


def test_nothing_is_left(hosts: list[Host], tmp_path: Path) -> None:
    made = Network(2)
    process, _ = start(made.hosts[1], tmp_path, "import time; time.sleep(60)")
    assert {host.address for host in made.hosts}.isdisjoint({host.address for host in hosts})
    made.close()
    made.close()
    assert process.wait(5) == -9
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert not any(host.name in left for host in made.hosts)
    assert all(host.name in left for host in hosts)


def test_the_next_network_takes_down_those_of_the_dead(tmp_path: Path) -> None:
    code = "import os; from cluster.network import Network; made = Network(1); print(made.hosts[0].name); "
    died = subprocess.run(
        [sys.executable, "-c", code + "os.sys.stdout.flush(); os._exit(1)"],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    name = died.stdout.strip()
    assert name, died.stderr
    with Network(1) as made:
        left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
        assert name not in left.split() or made.hosts[0].name == name
        assert made.hosts[0].pids() == []
