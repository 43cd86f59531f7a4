"""The statistics that the engine reports to vLLM's metrics after each step, and how they are shown.

vLLM sends each single observation of a histogram, and counts one after the other. A prompt has
thousands of blocks, so ours travel as counts by bucket: as a counter with two more labels.
"""

from collections.abc import Sequence
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (
    OffloadingConnectorStats,
    OffloadPromMetrics,
)

from vllm_cachescope.connectors.vllm.engine.tiers.cpu_policy import CPU
from vllm_cachescope.connectors.vllm.engine.tiers.remote import RemoteTierManager
from vllm_cachescope.metrics import (
    ENGINE_METRICS,
    EVICTIONS,
    STORE_BUCKETS,
    TIER_BYTES,
    TIER_KEYS,
    TIER_OPERATION_SECONDS,
    Metric,
)
from vllm_cachescope.observations import Observations
from vllm_cachescope.registration import TotalHistogram

SUM = "sum"
"""Stands where a bucket's number would, for the sum of what was observed."""

_HISTOGRAMS = {metric.name: metric for metric in ENGINE_METRICS if metric.kind == "histogram"}
_PREFIX = "cachescope_"
_COPIES = {
    operation: tuple(f"vllm:kv_offload_{operation}_{what}" for what in ("bytes", "time", "size"))
    for operation in ("load", "store")
}
"""vLLM's names of what was copied, by the CPU tier's operation."""
_MOVED = {("load", "hit"), ("store", "stored")}
"""What keys of a remote tier were moved, by operation and outcome."""


class TransferStats(OffloadingConnectorStats):
    """vLLM's statistics as its log shows them: its own, which are about transfers."""

    def reduce(self) -> dict[str, int | float]:
        reduced = super().reduce()
        return {name: value for name, value in reduced.items() if not name.startswith(_PREFIX)}


def move_observations(
    observations: Observations, metric: Metric, stats: OffloadingConnectorStats
) -> None:
    """Add observations to ``stats`` and begin again without any."""
    for labels, counts, total in observations.take():
        for bucket, times in counts.items():
            stats.increase_counter(metric.name, times, (*labels, str(bucket)))
        stats.increase_counter(metric.name, total, (*labels, SUM))


def add_copies(stats: OffloadingConnectorStats) -> None:
    """Add to ``stats`` what vLLM has in there of copies between the device and the CPU tier. vLLM
    tells the time that all copies of a step took together: each counts with its share of bytes."""
    times = Observations(STORE_BUCKETS)
    for operation, (bytes_name, time_name, size_name) in _COPIES.items():
        copied: int = _value(stats, bytes_name, 0)
        sizes: list[int] = _value(stats, size_name, [])
        if not copied:
            continue
        stats.increase_counter(TIER_BYTES.name, copied, (CPU, operation))
        seconds: float = _value(stats, time_name, 0.0)
        for size in sizes:
            times.add(seconds * size / sum(sizes), (CPU, operation, "ok"))
    move_observations(times, TIER_OPERATION_SECONDS, stats)


def _value(stats: OffloadingConnectorStats, name: str, default: Any) -> Any:
    return stats.data["data"].get(name, {}).get((), default)


def move_remote_counts(
    remotes: Sequence[RemoteTierManager], stats: OffloadingConnectorStats
) -> None:
    """Add what remote tiers have counted since the last report to ``stats``."""
    for remote in remotes:
        tier = remote.tier
        for (operation, outcome), keys in tier.take_stats().items():
            if operation == "evict":
                stats.increase_counter(EVICTIONS.name, keys, (remote.name, outcome))
                continue
            stats.increase_counter(TIER_KEYS.name, keys, (remote.name, operation, outcome))
            if (operation, outcome) in _MOVED:
                moved = keys * tier.slot_bytes
                stats.increase_counter(TIER_BYTES.name, moved, (remote.name, operation))
        move_observations(tier.take_times(), TIER_OPERATION_SECONDS, stats)


class ScopePromMetrics(OffloadPromMetrics):
    """vLLM's metrics of a connector, with histograms that are sent as counts by bucket."""

    def _increase_counter(
        self, metric_name: str, value: float, labelvalues: tuple[str, ...], engine_idx: int
    ) -> None:
        if metric_name not in _HISTOGRAMS:
            super()._increase_counter(metric_name, value, labelvalues, engine_idx)
            return
        *labels, what = labelvalues
        shown: Any = self._get_prometheus_metric(metric_name, tuple(labels), engine_idx)
        if isinstance(shown, TotalHistogram):
            shown.add({}, value) if what == SUM else shown.add({int(what): int(value)}, 0.0)
        elif what != SUM:
            # One of Ray's, which takes single observations and knows no sums of them.
            bounds = _HISTOGRAMS[metric_name].buckets
            for _ in range(int(value)):
                shown.observe(bounds[min(int(what), len(bounds) - 1)])
