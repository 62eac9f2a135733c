"""When the requests of an engine leave it. How that is noticed is in test_remote_engine.py."""

import pytest

from deployments.front.liveness import SILENT, reason_to_leave
from deployments.front.roster import Roster


@pytest.mark.parametrize(
    ("replicas", "suspects", "is_hopeless", "leaves"),
    [
        ("ab", {}, False, False),
        ("ab", {"b": "died"}, False, False),
        ("ab", {"a": "died"}, False, True),
        ("b", {"a": "died"}, False, True),
        ("a", {"a": "died"}, False, True),
        ("ab", {"a": SILENT}, False, True),
        ("a", {"a": SILENT}, False, False),
        ("a", {"a": SILENT}, True, True),
        ("ab", {"a": SILENT, "b": SILENT}, False, False),
        ("b", {"a": SILENT, "b": SILENT}, False, True),
        ("", {"a": SILENT}, False, True),
    ],
)
def test_reason_to_leave_a(replicas: str, suspects: dict[str, str], is_hopeless: bool, leaves: bool) -> None:
    roster = Roster()
    roster.update(replicas)
    roster.suspects |= suspects
    assert reason_to_leave(roster, "a", is_hopeless) == (suspects["a"] if leaves else None)
