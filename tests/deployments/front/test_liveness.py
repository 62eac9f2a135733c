"""When the requests of an engine leave it. How that is noticed is in test_remote_engine.py."""

import asyncio

import pytest

from deployments.front.liveness import SILENT, STOPPING, Attempt, Liveness, is_drained, reason_to_leave
from deployments.front.mailbox import DeltaQueue, Mailbox
from deployments.front.replay import EngineLost
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


@pytest.mark.parametrize(
    ("replicas", "suspects", "drained"),
    [
        ("ab", {}, False),
        ("b", {}, True),
        ("b", {"a": "died"}, False),
        ("b", {"a": SILENT}, False),
        ("ab", {"a": STOPPING}, True),
    ],
)
def test_an_engine_is_drained_if_it_leaves_without_a_suspicion(
    replicas: str, suspects: dict[str, str], drained: bool
) -> None:
    roster = Roster()
    roster.update(replicas)
    roster.suspects |= suspects
    assert is_drained(roster, "a") == drained


class FaultyOnce(Roster):
    """A roster whose suspects cannot be read the first time."""

    def __init__(self) -> None:
        super().__init__()
        self.faults = 0

    @property
    def suspects(self) -> dict[str, str]:
        self.faults += 1
        if self.faults == 1:
            raise RuntimeError("dictionary changed size during iteration")
        return self._suspects

    @suspects.setter
    def suspects(self, value: dict[str, str]) -> None:
        self._suspects = value


async def test_a_check_that_raises_is_not_the_last() -> None:
    async def probe(_: str) -> None:
        await asyncio.Event().wait()

    roster = FaultyOnce()
    roster._suspects["a"] = "died"
    liveness = Liveness(roster, Mailbox("127.0.0.1"), probe, heartbeat_timeout_s=3, patience_s=60)
    deltas = DeltaQueue()
    liveness.start()
    with liveness.watched(Attempt("a", 1, deltas)), pytest.raises(EngineLost, match="a died"):
        async with asyncio.timeout(5):
            await deltas.get()
    assert roster.faults > 1
