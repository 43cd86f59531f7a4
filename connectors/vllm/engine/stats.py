"""The statistics that the engine reports to vLLM's metrics after each step."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats

from vllm_cachescope.cache.eviction_history import EvictionReason
from vllm_cachescope.connectors.vllm.engine.health import TierInfo
from vllm_cachescope.connectors.vllm.engine.tiers.remote import RemoteTierManager
from vllm_cachescope.durations import format_duration
from vllm_cachescope.metrics import (
    EVICTIONS,
    PROMPT_TOKENS,
    REFUSED_PLANS,
    RESIDENT_BYTES,
    RESIDENT_ENTRIES,
    TIER_CAPACITY_BYTES,
    TIER_INFLIGHT_BYTES,
    TIER_KEYS,
    TIER_UP,
    TIER_USED_BYTES,
)


@dataclass(slots=True)
class Counts:
    """The counts of the scheduler side since the last report.

    Attributes:
        tokens: prompt tokens by outcome, scope and TTL in seconds (0 where none is covered).
        evictions: entries that left the device or the CPU tier, by tier and reason.
        refused_plans: prompts that came with a plan that is not genuine.
    """

    tokens: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    evictions: Counter[tuple[str, EvictionReason]] = field(default_factory=Counter)
    refused_plans: int = 0

    def move_to(self, stats: OffloadingConnectorStats) -> None:
        """Add the counts to ``stats`` and begin again at zero."""
        for (outcome, scope, ttl_s), tokens in self.tokens.items():
            ttl = format_duration(ttl_s) if ttl_s else "none"
            stats.increase_counter(PROMPT_TOKENS.name, tokens, (outcome, scope, ttl))
        for (tier, reason), entries in self.evictions.items():
            stats.increase_counter(EVICTIONS.name, entries, (tier, str(reason)))
        if self.refused_plans:
            stats.increase_counter(REFUSED_PLANS.name, self.refused_plans)
        self.tokens.clear()
        self.evictions.clear()
        self.refused_plans = 0


def move_remote_counts(
    remotes: Sequence[RemoteTierManager], stats: OffloadingConnectorStats
) -> None:
    """Add what remote tiers have counted since the last report to ``stats``."""
    for remote in remotes:
        for (operation, outcome), keys in remote.tier.take_stats().items():
            if operation == "evict":
                stats.increase_counter(EVICTIONS.name, keys, (remote.name, outcome))
                continue
            stats.increase_counter(TIER_KEYS.name, keys, (remote.name, operation, outcome))


class Gauges:
    """The engine's gauges, as they were last reported.

    Args:
        local: the device and the CPU tier.
        remotes: the remote tiers.
    """

    def __init__(self, local: Sequence[TierInfo], remotes: Sequence[RemoteTierManager]) -> None:
        self._local = {tier.name: tier for tier in local}
        self._remotes = remotes
        self._reported: dict[tuple[str, tuple[str, ...]], float] = {}

    def report_to(
        self, stats: OffloadingConnectorStats, resident: Sequence[tuple[str, int, int]]
    ) -> None:
        """Set those gauges that have changed: vLLM keeps the others at what they were set to.

        Args:
            stats: where they are set.
            resident: ``(tier, ttl_s, entries)`` of the device and the CPU tier.
        """
        for metric, labels, value in self._levels(resident):
            if self._reported.get((metric, labels)) != value:
                self._reported[metric, labels] = value
                stats.set_gauge(metric, value, labels)

    def _levels(
        self, resident: Sequence[tuple[str, int, int]]
    ) -> Iterator[tuple[str, tuple[str, ...], float]]:
        """Yield each gauge's name, labels and value."""
        used: Counter[str] = Counter()
        for name, ttl_s, entries in resident:
            labels = name, format_duration(ttl_s)
            used_bytes = entries * self._local[name].entry_bytes
            yield RESIDENT_ENTRIES.name, labels, entries
            yield RESIDENT_BYTES.name, labels, used_bytes
            used[name] += used_bytes
        for name, tier in self._local.items():
            yield TIER_UP.name, (name,), 1
            yield TIER_USED_BYTES.name, (name,), used[name]
            yield TIER_CAPACITY_BYTES.name, (name,), tier.capacity_bytes
        for remote in self._remotes:
            health = remote.tier.health()
            yield TIER_UP.name, (remote.name,), int(health["up"])
            for direction in ("loading", "storing"):
                queued = health[f"{direction}_bytes"]
                yield TIER_INFLIGHT_BYTES.name, (remote.name, direction), queued
            for metric, key in (
                (TIER_USED_BYTES, "used_bytes"),
                (TIER_CAPACITY_BYTES, "capacity_bytes"),
            ):
                # Neither is known of a tier that never answered.
                if key in health:
                    yield metric.name, (remote.name,), health[key]
