"""Metrics of many replicas as one Prometheus exposition.

Each replica keeps its own `CollectorRegistry` and answers `metrics()` with a `Snapshot` of
it; whoever serves `/metrics` gathers the snapshots of every replica and renders them
together. Replicas are told apart by their labels (`engine`, `front`), which they set
themselves: two replicas never report the same series.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Of what `render` returns."""


@dataclass(frozen=True)
class Series:
    """One sample: its name with suffix (`_bucket`, `_total`, ...), its labels, its value now."""

    name: str
    labels: dict[str, str]
    value: float


@dataclass(frozen=True)
class Family:
    """A metric with its help text, its Prometheus type ("counter", "gauge", "histogram", ...) and its series."""

    name: str
    help: str
    type: str
    series: tuple[Series, ...]


Snapshot = tuple[Family, ...]
"""All metrics of one replica at one moment: plain values, fit to cross processes."""


def snapshot(registry: CollectorRegistry) -> Snapshot:
    """What `registry` holds now. Creation times (`_created`) are left out: nothing reads them."""
    return tuple(
        Family(
            metric.name,
            metric.documentation,
            metric.type,
            tuple(
                Series(sample.name, dict(sample.labels), float(sample.value))
                for sample in metric.samples
                if not sample.name.endswith("_created")
            ),
        )
        for metric in registry.collect()
    )


def render(snapshots: Iterable[Snapshot]) -> bytes:
    """One exposition (text format 0.0.4) of all `snapshots`: each family once, whoever reports it.

    Raises ValueError if two replicas give one name different types.
    """
    return generate_latest(_Exposition(merge(snapshots)))


def merge(snapshots: Iterable[Snapshot]) -> Snapshot:
    """Families of the same name joined, in order of first appearance."""
    families: dict[str, Family] = {}
    for family in (family for snapshot in snapshots for family in snapshot):
        known = families.setdefault(family.name, family)
        if known is family:
            continue
        if known.type != family.type:
            raise ValueError(f"metric {family.name} is a {known.type} in one replica and a {family.type} in another")
        families[family.name] = replace(known, series=known.series + family.series)
    return tuple(families.values())


class _Exposition(Collector):
    """Families in the form that prometheus_client renders."""

    def __init__(self, families: Snapshot) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        for family in self._families:
            metric = Metric(family.name, family.help, family.type)
            metric.samples = [Sample(series.name, series.labels, series.value) for series in family.series]
            yield metric
