"""The directory's decisions, with a clock of the test's own and servers that are only reports."""

import numpy as np

from cluster.experts.directory import DEAD_AFTER_SECONDS, REBALANCE_SECONDS, SETTLE_SECONDS, Directory
from cluster.experts.routes import Balance
from cluster.experts.table import Report, ServerAddress

LAYERS = (1, 3)


class World:
    """A directory and servers that do at once what they are told, unless they are `lazy`."""

    def __init__(self, copies: int = 2) -> None:
        self.now = 0.0
        self.copies = copies
        self.holds: dict[str, frozenset] = {}
        self.rows: dict[str, dict] = {}
        self.lazy: set[str] = set()
        self.leaving: set[str] = set()
        self.max_units: dict[str, int] = {}
        self.start()

    def start(self) -> None:
        self.directory = Directory(LAYERS, 8, self.copies, lambda: self.now, first_epoch=100)

    def add(self, *names: str) -> None:
        for name in names:
            self.holds[name] = frozenset()

    def beat(self, name: str) -> None:
        address = ServerAddress(name, f"host-{name}", "unix:", "tcp:", b"")
        report = Report(
            address, self.holds[name], self.rows.get(name, {}), self.max_units.get(name), name in self.leaving
        )
        self.assignment = self.directory.report(report)
        if name not in self.lazy:
            self.holds[name] = self.assignment.hold | (self.assignment.named & self.holds[name])

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds / 0.5)):
            self.now += 0.5
            for name in list(self.holds):
                self.beat(name)
            self.directory.tick()

    def copies_of(self) -> dict:
        table = self.directory.table
        return {
            (layer, e): sorted(table.servers[place].id for place in of)
            for layer, experts in table.layers.items()
            for e, of in enumerate(experts)
        }


def test_servers_that_start_together_share_from_the_start():
    world = World()
    world.add("a", "b")
    world.run(SETTLE_SECONDS / 2)
    world.add("c", "d")
    world.run(SETTLE_SECONDS / 2)
    assert world.directory.table is None
    world.run(SETTLE_SECONDS + 1)
    assert {len(names) for names in world.copies_of().values()} == {2}
    assert {name: len(units) for name, units in world.holds.items()} == dict.fromkeys("abcd", 8)


def test_too_few_servers_for_the_copies_are_told_of(caplog):
    world = World(copies=3)
    world.add("a", "b")
    world.run(SETTLE_SECONDS + 2)
    assert "2 expert servers cannot hold 3 copies of each expert" in caplog.text
    world.add("c")
    caplog.clear()
    world.run(2)
    assert "cannot hold" not in caplog.text


def test_a_copy_is_named_only_when_it_is_there():
    world = World()
    world.add("a", "b")
    world.lazy = {"b"}
    world.run(SETTLE_SECONDS + 2)
    assert set(map(tuple, world.copies_of().values())) == {("a",)}
    world.lazy = set()
    world.run(1)
    assert set(map(tuple, world.copies_of().values())) == {("a", "b")}


def test_heartbeats_leave_the_table_to_the_next_tick():
    world = World()
    world.add("a", "b")
    world.lazy = {"a", "b"}
    world.run(SETTLE_SECONDS + 2)
    epoch, world.lazy = world.directory.table.epoch, set()
    for _ in range(2):
        for name in "ab":
            world.beat(name)
    assert world.directory.table.epoch == epoch
    world.directory.tick()
    assert world.directory.table.epoch == epoch + 1
    assert set(map(tuple, world.copies_of().values())) == {("a", "b")}


def test_a_silent_server_is_dropped_and_its_experts_are_held_twice_again():
    world = World()
    world.add(*"abcd")
    world.run(SETTLE_SECONDS + 2)
    epoch = world.directory.table.epoch
    del world.holds["b"]
    world.run(DEAD_AFTER_SECONDS + 1.5)
    assert "b" not in {server.id for server in world.directory.table.servers}
    assert {len(names) for names in world.copies_of().values()} == {2}
    assert set(world.directory.named()) == {"a", "c", "d"}
    assert sum(world.directory.named().values()) == 2 * len(world.copies_of())
    assert world.directory.table.epoch > epoch


def test_a_leaving_server_is_named_until_others_hold_what_it_held():
    world = World()
    world.add(*"abc")
    world.run(SETTLE_SECONDS + 2)
    world.leaving, world.lazy = {"a"}, {"b", "c"}
    world.run(1)
    assert any("a" in names for names in world.copies_of().values())
    assert min(len(names) for names in world.copies_of().values()) == 2
    world.lazy = set()
    world.run(1.5)
    assert not any("a" in names for names in world.copies_of().values())
    assert {len(names) for names in world.copies_of().values()} == {2}
    world.beat("a")
    assert not world.assignment.hold
    assert not world.assignment.named


def test_one_of_two_leaves_as_soon_as_the_other_holds_everything():
    world = World()
    world.add("a", "b")
    world.run(SETTLE_SECONDS + 2)
    world.leaving = {"a"}
    world.run(2)
    assert set(map(tuple, world.copies_of().values())) == {("b",)}
    world.beat("a")
    assert (world.assignment.hold, world.assignment.named) == (frozenset(), frozenset())


def test_when_all_leave_nobody_waits():
    for seconds in (SETTLE_SECONDS / 2, SETTLE_SECONDS + 2):
        world = World()
        world.add("a", "b")
        world.run(seconds)
        world.lazy = world.leaving = {"a", "b"}
        world.run(1)
        for name in "ab":
            world.beat(name)
            assert (world.assignment.hold, world.assignment.named) == (frozenset(), frozenset())


def test_a_new_directory_learns_what_is_held_and_moves_nothing():
    world = World()
    world.add(*"abcd")
    world.run(SETTLE_SECONDS + 2)
    held, epoch = dict(world.holds), world.directory.table.epoch
    world.start()
    world.run(SETTLE_SECONDS + 2)
    assert world.holds == held
    assert world.directory.table.layers.keys() == set(LAYERS)
    assert {len(names) for names in world.copies_of().values()} == {2}
    assert Directory(LAYERS, 8).table is None
    assert epoch >= 100


def test_load_is_followed_within_seconds():
    """One expert gets most rows: its load spreads over more servers, until all are about equally busy."""
    world = World()
    world.add(*"abcd")
    world.run(SETTLE_SECONDS + 2)
    hot = (1, 5)
    for _ in range(60):
        world.rows = {name: {} for name in "abcd"}
        table = world.directory.table
        for layer in LAYERS:
            rows = np.repeat(range(len(table.layers[layer])), 100)
            rows = np.append(rows, [hot[1]] * 1900) if layer == hot[0] else rows
            for segment in Balance(table.layers[layer], [True] * len(table.servers)).deal(rows)[1]:
                for expert, count in zip(segment.experts, segment.counts, strict=True):
                    given = world.rows[table.servers[segment.server].id]
                    given[layer, expert] = given.get((layer, expert), 0) + count
        world.run(0.5)
    assert len(world.copies_of()[hot]) > 2
    assert world.directory.imbalances()[1] < 1.2
    assert min(len(names) for names in world.copies_of().values()) >= 2


def test_little_load_moves_nothing():
    world = World()
    world.add(*"abcd")
    world.run(SETTLE_SECONDS + 2)
    held = dict(world.holds)
    world.rows = {"a": {(1, 5): 3}}
    world.run(3 * REBALANCE_SECONDS)
    assert world.holds == held


def test_memory_is_respected_and_what_does_not_fit_is_known():
    world = World()
    world.max_units = {"a": 6, "b": 6}
    world.add("a", "b")
    world.run(SETTLE_SECONDS + 2)
    assert all(len(units) <= 6 for units in world.holds.values())
    assert len(world.directory.table.missing()) == 4
    world.max_units["c"] = 20
    world.add("c")
    world.run(2)
    assert not world.directory.table.missing()
