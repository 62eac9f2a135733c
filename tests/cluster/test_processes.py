import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from cluster import processes
from cluster.processes import VARIABLE, end, of_run, wait

SLEEP = "import time; time.sleep(60)"


def test_ends_those_marked_or_writing_into_the_directory_and_no_other(tmp_path: Path) -> None:
    python = [sys.executable, "-c"]
    marked = subprocess.Popen([*python, SLEEP], env=os.environ | {VARIABLE: str(tmp_path)})
    with (tmp_path / "log").open("wb") as log:
        writing = subprocess.Popen([*python, SLEEP], stdout=log)
    with (tmp_path / "log").open("rb") as log:
        reading = subprocess.Popen([*python, SLEEP], stdin=log)
    other = subprocess.Popen([*python, SLEEP], env=os.environ | {VARIABLE: f"{tmp_path}-other"})
    try:
        assert {process.pid for process in of_run(tmp_path)} == {marked.pid, writing.pid}
        end(tmp_path)
        assert not psutil.pid_exists(marked.pid)
        assert not psutil.pid_exists(writing.pid)
        assert reading.poll() is None
        assert other.poll() is None
        assert not of_run(tmp_path)
    finally:
        for process in (marked, writing, reading, other):
            process.kill()
            process.wait()


def test_the_stubborn_are_killed(tmp_path: Path) -> None:
    ignore = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True); {SLEEP}"
    environment = os.environ | {VARIABLE: str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", ignore], env=environment, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    end(tmp_path, grace_s=0.2)
    assert not psutil.pid_exists(process.pid)
    process.wait()
    process.stdout.close()


def test_one_that_has_ended_is_not_waited_for_though_its_parent_takes_no_notice() -> None:
    """Seen by a process that is not the parent, as `make stop` is not."""
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    begun = time.monotonic()
    code = f"import psutil; from cluster.processes import wait; print(wait([psutil.Process({child.pid})], 30))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout == "True\n"
    assert time.monotonic() - begun < 20
    child.wait()
    alive = subprocess.Popen([sys.executable, "-c", SLEEP])
    assert not wait([psutil.Process(alive.pid)], 0.1)
    alive.kill()
    alive.wait()


def test_a_newcomer_takes_its_priority_back_when_it_serves():
    """With all its threads; where that is not allowed nobody is made a newcomer."""
    child = (
        "import os, threading; from cluster import processes\n"
        "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "def told(): return {os.getpriority(os.PRIO_PROCESS, int(each)) for each in os.listdir('/proc/self/task')}\n"
        "print(told(), processes.may_be_urgent()); processes.serve_first(); print(told())"
    )
    parent = (
        "import os, subprocess, sys; from cluster import processes\n"
        f"processes.start_as_newcomers(os.getpid()); subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    )
    ran = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True)
    before, after = ran.stdout.splitlines()
    assert before in (f"{{{processes.NEWCOMERS_NICENESS}}} True", "{0} False")
    assert after == "{0}"
