import logging
import sys

import pytest

from model.checkpoint import progress
from model.checkpoint.progress import LoadingProgress


class _Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = _Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_without_a_terminal_a_long_load_logs_now_and_then(clock, caplog, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    caplog.set_level(logging.INFO)
    with LoadingProgress(4_000_000_000) as loading:
        for _ in range(25):
            clock.now += 1
            loading.advance(100_000_000)
    assert [record.message for record in caplog.records] == [
        "Loading weights: 1.0 of 4.0 GB (25%)",
        "Loading weights: 2.0 of 4.0 GB (50%)",
    ]


def test_a_terminal_gets_a_bar_on_stderr_and_only_for_a_long_load(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with LoadingProgress(1000) as loading:
        loading.advance(500)
    assert capsys.readouterr() == ("", "")
    with LoadingProgress(1000) as loading:
        clock.now += 5
        loading.advance(500)
    out, err = capsys.readouterr()
    assert out == ""
    assert "Loading weights" in err


def test_a_rank_that_is_not_to_speak_is_silent(clock, caplog):
    caplog.set_level(logging.INFO)
    with LoadingProgress(1000, visible=False) as loading:
        clock.now += 60
        loading.advance(500)
    assert not caplog.records
