"""What an engine measures, under the names and with the buckets that vLLM's dashboards know.

What a step already counts is read when somebody asks; only times are observed as they happen.
"""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from deployments.engine.scheduler import Scheduler
from deployments.engine.sequence import Sequence
from deployments.metrics import Snapshot, snapshot

LABELS = ("model_name", "engine")

REQUEST_LATENCY = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
ITERATION_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
STEP = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)
OVERHEAD = (0.00005, 0.0001, 0.00015, 0.0002, 0.0003, 0.0005, 0.00075, 0.001, 0.002, 0.005, 0.01, 0.05)


class EngineMetrics:
    """Metrics of one engine replica. engine: its id."""

    def __init__(self, model_name: str, engine: str, scheduler: Scheduler) -> None:
        self.registry = CollectorRegistry()
        self.engine = engine
        self._labels = (model_name, engine)
        self.registry.register(_SchedulerState(scheduler, self._labels))
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Number of prefill tokens processed.")
        self.generation_tokens = self._counter("vllm:generation_tokens", "Number of generation tokens processed.")
        self.failed_steps = self._counter("moray:failed_steps", "Number of engine steps that raised.")
        self.images = self._counter("moray:images", "Number of images in requests.")
        self.image_cache_hits = self._counter(
            "moray:image_cache_hits", "Number of images that were not encoded, since their embeddings were kept."
        )
        self.image_encode = self._histogram("moray:image_encode_seconds", "Time of encoding an image.", STEP)
        self._queue = self._latency("request_queue", "time spent in WAITING phase for request")
        self._prefill = self._latency("request_prefill", "time spent in PREFILL phase for request")
        self._decode = self._latency("request_decode", "time spent in DECODE phase for request")
        self._inference = self._latency("request_inference", "time spent in RUNNING phase for request")
        self._iteration = self._histogram(
            "vllm:iteration_tokens_total", "Histogram of number of tokens per engine_step.", ITERATION_TOKENS
        )
        self._execute = self._histogram("moray:step_execute_seconds", "Time of a step in the model.", STEP)
        self._overhead = self._histogram("moray:step_overhead_seconds", "Time of a step outside the model.", OVERHEAD)

    def step(self, num_tokens: int, execute: float, overhead: float) -> None:
        """One step of `num_tokens`; times in seconds."""
        self._iteration.observe(num_tokens)
        self._execute.observe(execute)
        self._overhead.observe(overhead)

    def started(self, sequence: Sequence) -> None:
        """`sequence` leaves the queue for the first time."""
        sequence.started = time.monotonic()
        if sequence.index == 0:
            self._queue.observe(sequence.started - sequence.arrived)

    def first_output(self, sequence: Sequence) -> None:
        sequence.first_output = time.monotonic()
        if sequence.index == 0:
            self.prompt_tokens.inc(sequence.num_prompt)
            self._prefill.observe(sequence.first_output - sequence.started)

    def finished(self, sequence: Sequence) -> None:
        now = time.monotonic()
        self._decode.observe(now - sequence.first_output)
        self._inference.observe(now - sequence.started)

    def snapshot(self) -> Snapshot:
        return snapshot(self.registry)

    def _counter(self, name: str, documentation: str) -> Counter:
        return Counter(name, documentation, LABELS, registry=self.registry).labels(*self._labels)

    def _histogram(self, name: str, documentation: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, documentation, LABELS, buckets=buckets, registry=self.registry).labels(*self._labels)

    def _latency(self, name: str, what: str) -> Histogram:
        return self._histogram(f"vllm:{name}_time_seconds", f"Histogram of {what}.", REQUEST_LATENCY)


class _SchedulerState(Collector):
    """Gauges and counters that the scheduler holds anyway."""

    def __init__(self, scheduler: Scheduler, labels: tuple[str, str]) -> None:
        self._scheduler, self._labels = scheduler, labels

    def collect(self) -> Iterator[Metric]:
        scheduler, counts = self._scheduler, self._scheduler.counts
        gauges = {
            "num_requests_running": ("Number of requests in model execution batches.", len(scheduler.running)),
            "num_requests_waiting": ("Number of requests waiting to be processed.", len(scheduler.waiting)),
            "kv_cache_usage_perc": ("KV-cache usage. 1 means 100 percent usage.", scheduler.pool.usage),
        }
        counters = {
            "prefix_cache_queries": ("Prefix cache queries, in number of queried tokens.", counts.prefix_queries),
            "prefix_cache_hits": ("Prefix cache hits, in number of cached tokens.", counts.prefix_hits),
            "num_preemptions": ("Cumulative number of preemption from the engine.", counts.preemptions),
        }
        for kind, values in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (documentation, value) in values.items():
                family = kind(f"vllm:{name}", documentation, labels=LABELS)
                family.add_metric(self._labels, value)
                yield family
