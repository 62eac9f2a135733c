"""Serves a YAML on this machine in the foreground (`serve`), and ends that from another shell (`stop`).

`make serve` and `make stop` are these two. Everything said to the user is said here.
"""

import argparse
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from types import FrameType

import psutil
import yaml
from pydantic import ValidationError

from cluster import processes
from deployments import state
from deployments.config import ConfigError
from deployments.launch import Launch, LaunchFailed

STATE = Path(os.environ.get("MORAY_STATE", ".run/local.json"))
STOP_SECONDS = 6.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deployments.local", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    serving = commands.add_parser("serve", help="serve a YAML until Ctrl-C or stop")
    serving.add_argument("config", type=Path)
    commands.add_parser("stop", help="end what serve started")
    arguments = parser.parse_args()
    sys.exit(serve(arguments.config) if arguments.command == "serve" else stop())


def serve(config: Path) -> int:
    """Exit code 0 after a stop that was asked for, 1 if it could not start or did not go on."""
    earlier = state.load(STATE)
    if earlier and earlier.process():
        return _fail(f"already serving {earlier.config} (pid {earlier.pid}); `make stop` ends it")
    if earlier:
        _clean_up(earlier)
    signal.signal(signal.SIGTERM, _interrupt)
    launch = None
    try:
        launch = Launch(config)
        state.save(STATE, _state_of(launch, config))
        launch.start()
        launch.wait()
        return 0
    except KeyboardInterrupt:
        return 0
    except (LaunchFailed, ConfigError, OSError, ValidationError, yaml.YAMLError) as error:
        return _fail(f"cannot serve {config}: {error}")
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if launch:
            launch.stop()
            STATE.unlink(missing_ok=True)


def stop() -> int:
    """Asks the serving process to end, waits for that, and ends what is left of its run."""
    running = state.load(STATE)
    if running is None:
        print("Nothing is being served.")
        return 0
    begin = time.monotonic()
    if process := running.process():
        process.terminate()
        if not processes.wait([process], STOP_SECONDS):
            process.kill()
    _clean_up(running)
    print(f"Stopped ({time.monotonic() - begin:.1f} s).")
    return 0


def _clean_up(run: state.State) -> None:
    processes.end(Path(run.directory))
    shutil.rmtree(run.directory, ignore_errors=True)
    STATE.unlink(missing_ok=True)


def _state_of(launch: Launch, config: Path) -> state.State:
    this = psutil.Process()
    return state.State(this.pid, this.create_time(), str(launch.directory), str(config))


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":
    main()
