"""Compiles a C++ file of this package into a shared library, once for each version of it.

The machine's own compiler does it, into the user's cache folder (`MORAY_CACHE`, else `~/.cache/moray`).
"""

import ctypes
import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)

_FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC"]


class CannotBuild(Exception):
    """There is no compiler, or it does not accept the source. The message is its own."""


def library(source: Path, flags: list[str]) -> ctypes.CDLL:
    """`source` compiled with `flags` beside the usual ones, and loaded. Raises CannotBuild."""
    try:
        return ctypes.CDLL(str(_compiled(source, [*_FLAGS, *flags])))
    except subprocess.CalledProcessError as error:
        raise CannotBuild(error.stderr) from error
    except OSError as error:
        raise CannotBuild(str(error)) from error


def can_build(library: Callable[[], ctypes.CDLL], otherwise: str) -> bool:
    """Whether `library()` returns one; if not, the log says what is the case `otherwise`."""
    try:
        library()
    except CannotBuild as error:
        logger.warning("%s: %s", otherwise, error)
        return False
    return True


def _compiled(source: Path, flags: list[str]) -> Path:
    """Path of the shared library, built if it is not there yet."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if compiler is None:
        raise OSError("no C++ compiler (g++ or clang++) on the PATH")
    folder = Path(os.environ.get("MORAY_CACHE") or Path.home() / ".cache" / "moray")
    sources = [source, *sorted(source.parent.glob("*.h"))]
    text = b"".join(file.read_bytes() for file in sources) + " ".join([compiler, *flags]).encode()
    key = hashlib.sha256(text).hexdigest()[:16]
    target = folder / f"{source.stem}-{key}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{target.stem}.lock").open("w") as lock:
            # Of processes that start together one builds and the others wait; the kernel frees a dead one's lock.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                building = target.with_suffix(".building")
                command = [compiler, *flags, "-o", str(building), str(source)]
                subprocess.run(command, check=True, capture_output=True, text=True)
                os.replace(building, target)
    return target
