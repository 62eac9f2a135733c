"""Times counted in buckets, cheaply enough for every message."""

from array import array
from bisect import bisect_left

BUCKETS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Seconds."""


class LatencyCounts:
    """counts: int64, of each bucket and of what is beyond the last. fast_path.cpp adds to it, too."""

    def __init__(self) -> None:
        self.counts = array("q", [0] * (len(BUCKETS) + 1))
        self._sum = array("d", [0.0])

    @property
    def sum(self) -> float:
        """Seconds."""
        return self._sum[0]

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self._sum[0] += seconds

    def addresses(self) -> tuple[int, int]:
        """Of the counts and of the sum, float64."""
        return self.counts.buffer_info()[0], self._sum.buffer_info()[0]
