"""What `make stop` needs to know of what `make serve` started: a small file in .run/."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class State:
    """pid, started: the process that serves. directory: of Ray's sockets and logs; it marks the run's processes."""

    pid: int
    started: float
    directory: str
    config: str

    def process(self) -> psutil.Process | None:
        """The process that serves, if it lives; a pid that was given to another process does not count."""
        try:
            process = psutil.Process(self.pid)
            return process if process.is_running() and process.create_time() == self.started else None
        except psutil.NoSuchProcess:
            return None


def save(path: Path, state: State) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(state)))


def load(path: Path) -> State | None:
    """None if nothing was started."""
    try:
        return State(**json.loads(path.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None
