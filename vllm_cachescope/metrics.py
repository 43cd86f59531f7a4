"""The engine's metrics: names, labels, and what each one counts.

The API side registers counters of its own, in `break_log`, `diagnoser` and `ignored_markers`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from prometheus_client import Counter
from prometheus_client.metrics_core import Metric as Family


class TotalCounter(Counter):
    """A counter that shows its total alone.

    The client library adds a series ``…_created`` with the time at which it made the counter; next
    to ``…_prompt_tokens_total`` that reads like a count of created tokens.
    """

    def collect(self) -> Iterable[Family]:
        """Yield the counter's family of samples."""
        for family in super().collect():
            family.samples = [one for one in family.samples if not one.name.endswith("_created")]
            yield family


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric as Prometheus shows it; a counter's name gets ``_total`` there."""

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    labels: tuple[str, ...]


PROMPT_TOKENS = Metric(
    "cachescope_prompt_tokens",
    "counter",
    "Prompt tokens by what became of them (read_device, read_cpu, read_<tier>, created, "
    "uncached), by scope (global, org, session) and by TTL class ('none' where no breakpoint "
    "covers them).",
    ("outcome", "scope", "ttl"),
)
RESIDENT_BYTES = Metric(
    "cachescope_resident_bytes",
    "gauge",
    "Bytes of unexpired KV that a tier holds, by TTL class.",
    ("tier", "ttl"),
)
RESIDENT_ENTRIES = Metric(
    "cachescope_resident_entries",
    "gauge",
    "Unexpired entries (device: blocks; other tiers: chunks) that a tier holds, by TTL class.",
    ("tier", "ttl"),
)
EVICTIONS = Metric(
    "cachescope_evictions",
    "counter",
    "Entries that left a tier, by reason (ttl, capacity, quota: their organisation had more than "
    "its quota, purge, reset).",
    ("tier", "reason"),
)
REFUSED_PLANS = Metric(
    "cachescope_refused_plans",
    "counter",
    "Prompts that reached the engine with a plan not made with its secret; they share nothing.",
    (),
)
TIER_UP = Metric(
    "cachescope_tier_up",
    "gauge",
    "1 while a tier answers and may be used, else 0.",
    ("tier",),
)
TIER_USED_BYTES = Metric(
    "cachescope_tier_used_bytes",
    "gauge",
    "Bytes a tier has in use; of a remote tier, what its store says, whoever uses it.",
    ("tier",),
)
TIER_CAPACITY_BYTES = Metric(
    "cachescope_tier_capacity_bytes",
    "gauge",
    "Bytes a tier can hold; 0 where a remote tier's store has no set limit.",
    ("tier",),
)
TIER_KEYS = Metric(
    "cachescope_tier_keys",
    "counter",
    "Chunks that a remote tier was asked for, by operation (lookup, load, store, reclaim) and "
    "outcome (hit, miss, stored, present, expired; gone: evicted since the lookup; late: not "
    "within the deadline; dropped: the queue was full or the tier down; failed; refused; damaged: "
    "bad MAC or lease, deleted).",
    ("tier", "operation", "outcome"),
)
TIER_INFLIGHT_BYTES = Metric(
    "cachescope_tier_inflight_bytes",
    "gauge",
    "Bytes queued or under way to and from a remote tier, by direction (loading, storing).",
    ("tier", "direction"),
)

METRICS = (
    PROMPT_TOKENS,
    RESIDENT_BYTES,
    RESIDENT_ENTRIES,
    EVICTIONS,
    REFUSED_PLANS,
    TIER_UP,
    TIER_USED_BYTES,
    TIER_CAPACITY_BYTES,
    TIER_KEYS,
    TIER_INFLIGHT_BYTES,
)
