"""Metrics of experts: counters that servers, clients and the directory keep anyway, read when somebody asks."""

from collections.abc import Callable, Iterator
from itertools import accumulate

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from cluster.experts.client import ClientCounts
from cluster.experts.directory import Directory
from cluster.experts.latency import BUCKETS
from cluster.experts.server import ExpertServer
from cluster.experts.weights import HeldExperts


class ServerCollector(Collector):
    """Of one expert server."""

    def __init__(self, server: ExpertServer, experts: HeldExperts, model: str) -> None:
        self._server, self._experts, self._labels = server, experts, (model, server.address.id)

    def collect(self) -> Iterator[Metric]:
        tokens = CounterMetricFamily(
            "moray:expert_tokens", "Rows computed.", labels=("model_name", "server", "layer", "expert")
        )
        for (layer, expert), rows in sorted(self._server.rows.items()):
            tokens.add_metric((*self._labels, str(layer), str(expert)), rows)
        yield tokens
        labels = ("model_name", "server")
        for kind, name, documentation, value in (
            (CounterMetricFamily, "expert_calls", "Calls answered.", self._server.calls),
            (CounterMetricFamily, "expert_refusals", "Calls refused.", self._server.refusals),
            (CounterMetricFamily, "expert_busy_seconds", "Time in which experts computed.", self._server.busy_seconds),
            (GaugeMetricFamily, "expert_queue", "Clients that waited while one was answered.", self._server.waiting),
            (GaugeMetricFamily, "experts_held", "Experts in memory, over all layers.", len(self._experts.units)),
        ):
            family = kind(f"moray:{name}", documentation, labels=labels)
            family.add_metric(self._labels, value)
            yield family


class ClientCollector(Collector):
    """Of an engine that uses expert servers. counts: of every rank."""

    def __init__(self, counts: Callable[[], dict[int, ClientCounts]], model: str, engine: str) -> None:
        self._counts, self._labels = counts, (model, engine)

    def collect(self) -> Iterator[Metric]:
        labels, ranks = ("model_name", "engine", "rank"), self._counts()
        failovers = CounterMetricFamily(
            "moray:expert_failovers", "Calls that went to another copy, by the server that did not answer.",
            labels=(*labels, "server", "layer"),
        )  # fmt: skip
        for rank, counts in ranks.items():
            for (server, layer), count in sorted(counts.failovers.items()):
                failovers.add_metric((*self._labels, str(rank), server, str(layer)), count)
        yield failovers
        waits = CounterMetricFamily(
            "moray:expert_waits", "Times that a step waited since no copy of an expert answered.", labels=labels
        )
        for rank, counts in ranks.items():
            waits.add_metric((*self._labels, str(rank)), counts.waits)
        yield waits
        trips = HistogramMetricFamily(
            "moray:expert_round_trip_seconds", "From a call to its answer.", labels=(*labels, "server")
        )
        names = [*map(str, BUCKETS), "+Inf"]
        for rank, counts in ranks.items():
            for server, latency in sorted(counts.latency.items()):
                buckets = list(zip(names, accumulate(latency.counts), strict=True))
                trips.add_metric((*self._labels, str(rank), server), buckets, latency.sum)
        yield trips
        epoch = GaugeMetricFamily("moray:expert_table_epoch", "Of the routing table in use.", labels=labels)
        for rank, counts in ranks.items():
            epoch.add_metric((*self._labels, str(rank)), counts.epoch)
        yield epoch


class DirectoryCollector(Collector):
    """Of the directory of one model."""

    def __init__(self, directory: Directory, model: str) -> None:
        self._directory, self._model = directory, model

    def collect(self) -> Iterator[Metric]:
        named = GaugeMetricFamily(
            "moray:experts_named", "Experts for which the table names a server.", labels=("model_name", "server")
        )
        # Before the copies: they are then of this table or of a later one.
        for server, count in sorted(self._directory.named().items()):
            named.add_metric((self._model, server), count)
        yield named
        copies = GaugeMetricFamily(
            "moray:expert_copies", "Servers that hold an expert.", labels=("model_name", "layer", "expert")
        )
        for (layer, expert), count in sorted(self._directory.copies().items()):
            copies.add_metric((self._model, str(layer), str(expert)), count)
        yield copies
        uneven = GaugeMetricFamily(
            "moray:expert_imbalance",
            "Rows of the busiest server over the mean.",
            labels=("model_name", "layer"),
        )
        for layer, value in sorted(self._directory.imbalances().items()):
            uneven.add_metric((self._model, str(layer)), value)
        yield uneven
        servers = GaugeMetricFamily("moray:expert_servers", "Expert servers alive.", labels=("model_name",))
        servers.add_metric((self._model,), len(self._directory.members()))
        yield servers
