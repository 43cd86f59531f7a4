"""The metrics, by name, with what they count and their labels."""

from dataclasses import dataclass
from typing import Literal


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
    "Prompt tokens by what became of them (read_device, read_cpu, created, uncached), by scope "
    "(global, org, session) and by TTL class ('none' where no breakpoint covers them).",
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
    "Entries that left a tier, by reason (ttl, capacity, reset).",
    ("tier", "reason"),
)
REFUSED_PLANS = Metric(
    "cachescope_refused_plans",
    "counter",
    "Prompts that reached the engine without a plan made with its secret; they share nothing.",
    (),
)

METRICS = (PROMPT_TOKENS, RESIDENT_BYTES, RESIDENT_ENTRIES, EVICTIONS, REFUSED_PLANS)
