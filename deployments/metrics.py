"""Metrics of many replicas as one Prometheus exposition.

Each replica keeps its own `CollectorRegistry` and answers `metrics()` with a `Snapshot` of
it; whoever serves `/metrics` gathers the snapshots of every replica and joins them. Replicas
are told apart by their labels (`engine`, `front`), which they set themselves: two replicas
never report the same series. A snapshot is text already: a replica with hundreds of experts
renders its own in a few ms, and nobody else takes it apart but by family.
"""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, disable_created_metrics, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Of what `render` returns."""

Snapshot = str
"""All metrics of one replica at one moment, in that format."""

disable_created_metrics()  # nothing reads them


def snapshot(registry: CollectorRegistry) -> Snapshot:
    """What `registry` holds now."""
    return generate_latest(registry).decode()


def render(snapshots: Iterable[Snapshot]) -> bytes:
    """One exposition of all `snapshots`: each family once, in order of first appearance, whoever reports it.

    Raises ValueError if two replicas give one name different types.
    """
    families: dict[str, list[str]] = {}
    for family in (family for text in snapshots for family in f"\n{text}".split("\n# HELP ")[1:]):
        name, _, rest = family.partition(" ")
        documentation, _, rest = rest.partition("\n")
        type_, _, samples = rest.partition("\n")
        lines = families.setdefault(name, [f"# HELP {name} {documentation}", type_])
        if lines[1] != type_:
            kinds = lines[1].rpartition(" ")[2], type_.rpartition(" ")[2]
            raise ValueError(f"metric {name} is a {kinds[0]} in one replica and a {kinds[1]} in another")
        lines.append(samples.rstrip("\n"))
    return "".join(f"{line}\n" for lines in families.values() for line in lines if line).encode()
