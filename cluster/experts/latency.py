"""Times counted in buckets, cheaply enough for every message."""

from bisect import bisect_left
from dataclasses import dataclass, field

BUCKETS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Seconds."""


@dataclass
class LatencyCounts:
    """counts: of each bucket, and of what is beyond the last. sum: seconds."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    sum: float = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.sum += seconds
