"""The registration of metrics with Prometheus' client library."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.samples import Sample

from vllm_cachescope.metrics import ENGINE_LABELS, Metric


class TotalCounter(Counter):
    """A counter that shows its total alone.

    The client library adds a series ``…_created`` with the time at which it made the counter; next
    to ``…_prompt_tokens_total`` that reads like a count of created tokens.
    """

    def _child_samples(self) -> Iterable[Sample]:
        return _without_created(super()._child_samples())


class TotalHistogram(Histogram):
    """A histogram without the library's ``…_created``, to which many observations can be added at
    once."""

    def _child_samples(self) -> Iterable[Sample]:
        return _without_created(super()._child_samples())

    def add(self, counts: dict[int, int], total: float) -> None:
        """Add observations, as counts by the number of the bucket, from 0, and their sum."""
        self._sum.inc(total)
        for bucket, times in counts.items():
            self._buckets[bucket].inc(times)


def counter(metric: Metric, registry: CollectorRegistry, by_org: bool = False) -> Counter:
    """Register a counter.

    Args:
        metric: what it counts.
        registry: where.
        by_org: whether metrics tell organisations apart.
    """
    labels = ENGINE_LABELS + metric.labels_by(by_org)
    return TotalCounter(metric.name, metric.help, labels, registry=registry)


def gauge(metric: Metric, registry: CollectorRegistry) -> Gauge:
    """Register a gauge that adds up over the API processes that live."""
    labels = ENGINE_LABELS + metric.labels
    return Gauge(metric.name, metric.help, labels, registry=registry, multiprocess_mode="livesum")


def histogram(metric: Metric, registry: CollectorRegistry) -> Histogram:
    """Register a histogram."""
    labels = ENGINE_LABELS + metric.labels
    return TotalHistogram(
        metric.name, metric.help, labels, registry=registry, buckets=metric.buckets
    )


def _without_created(samples: Iterable[Sample]) -> list[Sample]:
    # Here and not in `collect`: what is never made costs a scrape nothing.
    return [sample for sample in samples if sample.name != "_created"]
