"""The gauges that the engine reports to vLLM's metrics after each step."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats

from vllm_cachescope.connectors.vllm.engine.health import TierInfo
from vllm_cachescope.connectors.vllm.engine.scheduler import CacheScopeConnectorScheduler
from vllm_cachescope.durations import format_duration
from vllm_cachescope.metrics import (
    PREFILL_RATE,
    QUOTA_USED,
    RESIDENT_BYTES,
    RESIDENT_ENTRIES,
    TIER_CAPACITY_BYTES,
    TIER_INFLIGHT_BYTES,
    TIER_QUEUE,
    TIER_UP,
    TIER_USED_BYTES,
)

Level = tuple[str, tuple[str, ...], float]
"""A gauge's name, its label values and its value."""


class Gauges:
    """The engine's gauges, as they were last reported.

    Args:
        tiers: the device and the CPU tier.
        scheduler: knows what these hold, and the remote tiers.
    """

    def __init__(self, tiers: Sequence[TierInfo], scheduler: CacheScopeConnectorScheduler) -> None:
        self._tiers = {tier.name: tier for tier in tiers}
        self._scheduler = scheduler
        self._reported: dict[tuple[str, tuple[str, ...]], float] = {}
        self._quota_used: Mapping[str, float] = {}
        self._last_state: object = None

    def report_to(self, stats: OffloadingConnectorStats) -> None:
        """Set those gauges that have changed: vLLM keeps the others at what they were set to."""
        state = self._state()
        if state == self._last_state:
            return
        self._last_state = state
        for metric, labels, value in self._changed():
            self._reported[metric, labels] = value
            stats.set_gauge(metric, value, labels)

    def _state(self) -> object:
        """Return what all gauges follow from. In most steps none of it has changed, and gauges are
        not worked out."""
        scheduler = self._scheduler
        return (
            scheduler.prefill_rate.tokens_per_s,
            self._quota_used,
            scheduler.local.resident(),
            [(remote.tier.health(), remote.tier.queues()) for remote in scheduler.remotes],
        )

    def sweep(self) -> bool:
        """Look at what is too much work for each step; return whether `report_to` has something to
        report. A tier may have gone down while the engine had nothing to do."""
        self._quota_used = self._scheduler.local.quota_used()
        return next(self._changed(), None) is not None

    def _changed(self) -> Iterator[Level]:
        for metric, labels, value in self._levels():
            if self._reported.get((metric, labels)) != value:
                yield metric, labels, value

    def _levels(self) -> Iterator[Level]:
        if (rate := self._scheduler.prefill_rate.tokens_per_s) is not None:
            yield PREFILL_RATE.name, (), rate
        for name, share in self._quota_used.items():
            yield QUOTA_USED.name, (name,), share
        used: Counter[str] = Counter()
        for name, ttl_s, entries in self._scheduler.local.resident():
            labels = name, format_duration(ttl_s)
            used_bytes = entries * self._tiers[name].entry_bytes
            yield RESIDENT_ENTRIES.name, labels, entries
            yield RESIDENT_BYTES.name, labels, used_bytes
            used[name] += used_bytes
        for name, tier in self._tiers.items():
            yield TIER_UP.name, (name,), 1
            yield TIER_USED_BYTES.name, (name,), used[name]
            yield TIER_CAPACITY_BYTES.name, (name,), tier.capacity_bytes
        for remote in self._scheduler.remotes:
            health = remote.tier.health()
            yield TIER_UP.name, (remote.name,), int(health["up"])
            for direction in ("loading", "storing"):
                queued = health[f"{direction}_bytes"]
                yield TIER_INFLIGHT_BYTES.name, (remote.name, direction), queued
            for queue, entries in remote.tier.queues().items():
                yield TIER_QUEUE.name, (remote.name, queue), entries
            for metric, key in (
                (TIER_USED_BYTES, "used_bytes"),
                (TIER_CAPACITY_BYTES, "capacity_bytes"),
            ):
                # Neither is known of a tier that never answered.
                if key in health:
                    yield metric.name, (remote.name,), health[key]
