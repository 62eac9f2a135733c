"""What a front measures, under the names and with the buckets that vLLM's dashboards know.

One set for each front and model; deployments/metrics.py joins those of all replicas.
"""

import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate
from types import TracebackType

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.metrics_core import HistogramMetricFamily
from prometheus_client.registry import Collector

LABELS = ("model_name", "front")
FINISHED_REASONS = ("stop", "length", "abort", "error")

TIME_TO_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
INTER_TOKEN_LATENCY = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_LATENCY = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
PARAMS_N = (1, 2, 5, 10, 20)


def token_buckets(most: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, … up to `most`."""
    buckets = [digit * 10**power for power in range(len(str(most))) for digit in (1, 2, 5)]
    return [bucket for bucket in buckets if bucket <= most]


class LatencyHistogram(Collector):
    """A histogram whose `observe` costs well below a microsecond: it is called for every token, by one thread."""

    def __init__(self, name: str, documentation: str, labels: Sequence[str], buckets: Sequence[float]) -> None:
        self._name = name
        self._documentation = documentation
        self._labels = labels
        self._buckets = buckets
        self._children: dict[tuple[str, ...], LatencySeries] = {}

    def labels(self, *values: str) -> "LatencySeries":
        return self._children.setdefault(values, LatencySeries(self._buckets))

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._documentation, labels=self._labels)
        names = [*(str(bucket) for bucket in self._buckets), "+Inf"]
        for values, series in self._children.items():
            cumulative = accumulate(series.counts)
            family.add_metric(values, list(zip(names, cumulative, strict=True)), series.sum)
        yield family


class LatencySeries:
    """Counts in each bucket (the last is beyond all bounds) and the sum of what was observed."""

    def __init__(self, buckets: Sequence[float]) -> None:
        self._buckets = buckets
        self.counts = [0] * (len(buckets) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(self._buckets, seconds)] += 1
        self.sum += seconds


class FrontMetrics:
    """All metrics of a front. max_model_len: the longest of its models', which bounds the token buckets."""

    def __init__(self, front: str, max_model_len: int) -> None:
        self.front = front
        self.registry = CollectorRegistry()
        tokens = token_buckets(max_model_len)
        self.request_success = Counter(
            "vllm:request_success", "Finished choices.", (*LABELS, "finished_reason"), registry=self.registry
        )
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "From the arrival of a request to its first token.", TIME_TO_FIRST_TOKEN
        )
        self.inter_token_latency = LatencyHistogram(
            "vllm:inter_token_latency_seconds", "Between two deliveries to one choice.", LABELS, INTER_TOKEN_LATENCY
        )
        self.registry.register(self.inter_token_latency)
        self.time_per_output_token = self._histogram(
            "request_time_per_output_token_seconds", "Mean time of a choice's later tokens.", INTER_TOKEN_LATENCY
        )
        self.e2e_request_latency = self._histogram(
            "e2e_request_latency_seconds", "From the arrival of a request to the end of a choice.", REQUEST_LATENCY
        )
        self.prompt_tokens = self._histogram("request_prompt_tokens", "Tokens of a prompt.", tokens)
        self.generation_tokens = self._histogram("request_generation_tokens", "Tokens of a choice.", tokens)
        self.params_n = self._histogram("request_params_n", "The `n` of requests.", PARAMS_N)
        self.params_max_tokens = self._histogram("request_params_max_tokens", "The `max_tokens` of requests.", tokens)

    def _histogram(self, name: str, documentation: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"vllm:{name}", documentation, LABELS, buckets=buckets, registry=self.registry)

    def of_model(self, model: str) -> "ModelMetrics":
        return ModelMetrics(self, model)


class ModelMetrics:
    """A front's metrics of one model."""

    def __init__(self, metrics: FrontMetrics, model: str) -> None:
        labels = (model, metrics.front)
        self.success = {reason: metrics.request_success.labels(*labels, reason) for reason in FINISHED_REASONS}
        self.time_to_first_token = metrics.time_to_first_token.labels(*labels)
        self.inter_token_latency = metrics.inter_token_latency.labels(*labels)
        self.time_per_output_token = metrics.time_per_output_token.labels(*labels)
        self.e2e_request_latency = metrics.e2e_request_latency.labels(*labels)
        self.prompt_tokens = metrics.prompt_tokens.labels(*labels)
        self.generation_tokens = metrics.generation_tokens.labels(*labels)
        self.params_n = metrics.params_n.labels(*labels)
        self.params_max_tokens = metrics.params_max_tokens.labels(*labels)

    def start(self, arrived: float, prompt_lengths: Sequence[int], n: int, max_tokens: int) -> "RequestClock":
        """A valid request, which came in at `arrived` (`time.perf_counter()`)."""
        for length in prompt_lengths:
            self.prompt_tokens.observe(length)
        self.params_n.observe(n)
        self.params_max_tokens.observe(max_tokens)
        return RequestClock(self, arrived, len(prompt_lengths) * n)


class RequestClock:
    """Times one request. Leaving it counts the choices that have not finished as aborted, or as failed."""

    def __init__(self, metrics: ModelMetrics, start: float, num_choices: int) -> None:
        self._metrics = metrics
        self._start = start
        self._first: float | None = None
        self._last: dict[int, float] = {}
        self._begun: dict[int, float] = {}
        self._unfinished = num_choices

    def __enter__(self) -> "RequestClock":
        return self

    def tick(self, choice: int, num_tokens: int, finish_reason: str | None) -> None:
        """Tokens have arrived for a choice, which now has `num_tokens`."""
        now = time.perf_counter()
        before = self._last.get(choice)
        if before is not None:
            self._metrics.inter_token_latency.observe(now - before)
        else:
            self._begun[choice] = now
            if self._first is None:
                self._first = now
                self._metrics.time_to_first_token.observe(now - self._start)
        self._last[choice] = now
        if finish_reason is not None:
            self._finish(now, now - self._begun[choice], num_tokens, finish_reason)

    def _finish(self, now: float, decode: float, num_tokens: int, finish_reason: str) -> None:
        self._unfinished -= 1
        self._metrics.success[finish_reason].inc()
        self._metrics.e2e_request_latency.observe(now - self._start)
        self._metrics.generation_tokens.observe(num_tokens)
        if num_tokens > 1:
            self._metrics.time_per_output_token.observe(decode / (num_tokens - 1))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failed = isinstance(error, Exception)
        self._metrics.success["error" if failed else "abort"].inc(self._unfinished)
        self._unfinished = 0
