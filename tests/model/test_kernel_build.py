"""Compiling: once for each version, however many processes ask, and a clear error when it fails."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from model.kernels import build

COMPILER = shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")

ASK = """
import sys
from pathlib import Path
from model.kernels import build
print(build.library(Path(sys.argv[1]), []).answer())
"""


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source file; the compiler notes each of its runs in the file `runs`."""
    counting = tmp_path / "c++"
    counting.write_text(f'#!/bin/sh\necho run >> {tmp_path}/runs\nsleep 0.5\nexec {COMPILER} "$@"\n')
    counting.chmod(0o755)
    monkeypatch.setenv("CXX", str(counting))
    monkeypatch.setenv("MORAY_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "answer.cpp"
    file.write_text('extern "C" int answer() { return 42; }\n')
    return file


def test_processes_that_start_together_compile_once(source: Path) -> None:
    asking = [
        subprocess.Popen([sys.executable, "-c", ASK, str(source)], stdout=subprocess.PIPE, text=True, env=os.environ)
        for _ in range(3)
    ]
    assert [process.communicate(timeout=60)[0] for process in asking] == ["42\n"] * 3
    assert (source.parent / "runs").read_text() == "run\n"


def test_the_compiler_says_why_it_refuses(source: Path) -> None:
    source.write_text("no C++\n")
    with pytest.raises(build.CannotBuild, match="error"):
        build.library(source, [])
