"""A real stack, started the way `make serve` starts it, on free ports and in a directory of its own."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from cluster import processes
from deployments import state

ROOT = Path(__file__).parents[1]
READY_SECONDS = 120

needs_moe = pytest.mark.skipif(
    not (ROOT / "models/smollm2-moe/config.json").is_file(),
    reason="models/smollm2-moe is not there: `make test` makes it",
)
"""Marks tests of the mixture of experts that examples/smollm2-moe makes of the quickstart's model."""


class Stack:
    """`python -m deployments.local serve` of `config`, and `stop`."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        folder.mkdir(exist_ok=True)
        self.config = folder / "serve.yaml"
        self.log = folder / "serve.log"
        self.environment = os.environ | {"MORAY_STATE": str(folder / "state.json"), "OMP_NUM_THREADS": "1"}
        self.config.write_text(yaml.safe_dump(config))
        self.url = f"http://127.0.0.1:{config['http_options']['port']}"

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "deployments.local", *arguments]

    def start(self) -> None:
        """Returns when the stack is ready; fails with its output if it ends instead."""
        with self.log.open("wb") as log:
            command = self.command("serve", str(self.config))
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=self.environment, cwd=ROOT)
        for _ in range(READY_SECONDS * 10):
            if "\ncurl " in self.log.read_text():
                return
            try:
                self.process.wait(0.1)
                break
            except subprocess.TimeoutExpired:
                continue
        self.stop()
        pytest.fail(f"not ready in {READY_SECONDS} s:\n{self.log.read_text()}")

    @property
    def run(self) -> Path:
        """The directory that marks the processes of what is started."""
        known = state.load(Path(self.environment["MORAY_STATE"]))
        assert known is not None
        return Path(known.directory)

    def processes(self, *titles: str) -> list[psutil.Process]:
        """Living ones whose title begins with one of these."""
        living = [(process, process.cmdline()) for process in processes.of_run(self.run)]
        return [process for process, command in living if command and command[0].startswith(titles)]

    def stop(self) -> str:
        """What `stop` printed."""
        command = self.command("stop")
        result = subprocess.run(command, capture_output=True, text=True, env=self.environment, cwd=ROOT, check=True)
        self.process.wait(30)
        return result.stdout


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serve_yaml(args: dict[str, Any]) -> dict[str, Any]:
    """A whole Serve configuration around the application's `args`, on a free port; engines share one CPU."""
    engines = [
        {"name": f"engine-{model['id']}", "ray_actor_options": {"num_cpus": 1 / len(args["models"])}}
        for model in args["models"]
    ]
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": free_port()},
        "applications": [
            {
                "name": "moray",
                "route_prefix": "/",
                "import_path": "deployments.app:build",
                "args": args,
                "deployments": [{"name": "front", "ray_actor_options": {"num_cpus": 0.25}}, *engines],
            }
        ],
    }
