"""Observations: times or shares that are counted in a histogram's buckets, until they are taken."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence

Labels = tuple[str, ...]


class Observations:
    """Observations of one quantity by labels, as counts by bucket and sums. However many there are,
    they take the memory of the buckets. Not thread-safe.

    Args:
        bounds: upper bounds of the buckets, ascending; what is above them all has a bucket, too.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts: Counter[tuple[Labels, int]] = Counter()
        self._sums: dict[Labels, float] = {}

    def add(self, value: float, labels: Labels, times: int = 1) -> None:
        """Count ``times`` observations of ``value``."""
        self._counts[labels, bisect_left(self._bounds, value)] += times
        self._sums[labels] = self._sums.get(labels, 0.0) + value * times

    def take(self) -> Iterator[tuple[Labels, Counter[int], float]]:
        """Yield ``(labels, counts, sum)`` since the last time, with counts by the number of the
        bucket, from 0."""
        counts, self._counts = self._counts, Counter()
        sums, self._sums = self._sums, {}
        of_labels: dict[Labels, Counter[int]] = {labels: Counter() for labels in sums}
        for (labels, bucket), times in counts.items():
            of_labels[labels][bucket] += times
        for labels, total in sums.items():
            yield labels, of_labels[labels], total
