"""The list of metrics: each one's name, labels and what it counts.

Those of the engine are filled by `connectors/vllm/engine/stats.py` and shown by vLLM itself; those
of the API side by what is there. Each has vLLM's own labels ``model_name`` and ``engine`` in front
of its own. Where a request on the API side never reached an engine, ``engine`` is `NO_ENGINE`.
"""

from dataclasses import dataclass
from typing import Literal

ENGINE_LABELS = ("model_name", "engine")
"""vLLM's labels, in front of each metric's own."""

NO_ENGINE = "none"
"""Value of the label ``engine`` of what no engine had."""

ORG = "org"
"""The label of metrics by organisation, where the operator has asked for it."""

OTHER_ORG = "other"
"""Value of the label ``org`` for every organisation that is not listed."""

SHARE_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
"""Bounds of what is measured in lifetimes: times a TTL they are seconds."""

STORE_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
"""Bounds of what tiers do, in seconds."""

WAIT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Bounds of how long requests wait for room, in seconds."""

STAGE_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5)
"""Bounds of the stages of a request on the API side, in seconds."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric as Prometheus shows it.

    Attributes:
        name: its name, in base units; a counter's gets ``_total`` in Prometheus.
        kind: what Prometheus calls its type.
        help: what it counts, in words that an operator can act on.
        labels: the names of its labels, behind ``model_name`` and ``engine``.
        buckets: the upper bounds of a histogram.
        by_org: whether it has the label `ORG` as well, once the operator asks for it.
        side: which side fills it.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    by_org: bool = False
    side: Literal["engine", "api"] = "engine"

    @property
    def shown(self) -> str:
        """The name in Prometheus; that of a histogram without ``_bucket``, ``_sum``, ``_count``."""
        return f"{self.name}_total" if self.kind == "counter" else self.name

    def labels_by(self, by_org: bool) -> tuple[str, ...]:
        """Return the names of its own labels where metrics tell organisations apart, or do not."""
        return (*self.labels, ORG) if by_org and self.by_org else self.labels


# What became of prompts.

PROMPT_TOKENS = Metric(
    "cachescope_prompt_tokens",
    "counter",
    "Prompt tokens by what became of them (read_device, read_cpu, read_<tier>, created, "
    "uncached), by scope (global, org, session) and by TTL class ('none' where no breakpoint "
    "covers them).",
    ("outcome", "scope", "ttl"),
    by_org=True,
)
REQUESTS = Metric(
    "cachescope_requests",
    "counter",
    "Prompts by whether they read: 'read' if any of their tokens came from the cache, 'created' "
    "if none did and some were put into it, 'neither' otherwise, as with a prompt shorter than a "
    "block. A request with several prompts counts once for each.",
    ("outcome",),
    by_org=True,
)
QUERY_TOKENS = Metric(
    "cachescope_query_tokens",
    "counter",
    "Prompt tokens that were looked up, which is all of them. The rate of "
    "cachescope_hit_tokens_total divided by the rate of this is the hit ratio.",
)
HIT_TOKENS = Metric(
    "cachescope_hit_tokens",
    "counter",
    "Prompt tokens read from the cache instead of computed, by the tier that had them.",
    ("tier",),
)
HIT_AGE = Metric(
    "cachescope_hit_age_ratio",
    "histogram",
    "Share of its lifetime that a block on the device or in the CPU tier had spent since its last "
    "use when a prompt read it: 0 just used, 1 about to expire; times the TTL of the label it is "
    "seconds. Mass near 1 says that a longer TTL would find more, mass near 0 that a shorter one "
    "would do.",
    ("tier", "ttl"),
    SHARE_BUCKETS,
)
PREFILL_SECONDS_SAVED = Metric(
    "cachescope_prefill_seconds_saved",
    "counter",
    "Seconds of prefill that reading from the cache saved: tokens read, at the rate at which this "
    "engine was last seen to compute prompts (cachescope_prefill_tokens_per_second).",
    ("tier",),
    by_org=True,
)
PREFILL_RATE = Metric(
    "cachescope_prefill_tokens_per_second",
    "gauge",
    "Rate at which the engine computes prompts, a moving average over its steps.",
)
INPUT_COST = Metric(
    "cachescope_input_cost_tokens",
    "counter",
    "Cost of all input in base input tokens: caching='without' as if every token were computed "
    "at the price of one; caching='with' as it was read (0.1), created for up to 5 minutes "
    "(1.25), for longer (2) or computed uncached (1), unless the file of prices says otherwise. "
    "Times the price of an input token both are money, and the difference is what caching saves.",
    ("caching",),
    by_org=True,
)
REFUSED_PLANS = Metric(
    "cachescope_refused_plans",
    "counter",
    "Prompts that reached the engine with a plan not made with its secret; they share nothing. "
    "Any means that API side and engine have different secrets, or that a client forges plans.",
)
REFUSED_HINTS = Metric(
    "cachescope_refused_plan_hints",
    "counter",
    "Prompts whose plan in kv_hints did not count, by reason (untrusted: front_end.trusted is off; "
    "version, schema, organisation, global, ttl, spans). They are cached by the operator's "
    "default.",
    ("reason",),
)

# What tiers hold, and what leaves them.

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
ORG_EVICTIONS = Metric(
    "cachescope_org_evictions",
    "counter",
    "Entries that left the device or the CPU tier before their time for want of room, by the part "
    "of organisations in it: suffered (it was theirs, and another's took its room), caused (theirs "
    "took it from another's), own (both were theirs, or they were over their quota). Who caused it "
    "is not known of every eviction.",
    ("tier", "part"),
    by_org=True,
)
EARLY_EVICTIONS = Metric(
    "cachescope_early_evictions",
    "counter",
    "Entries that left the device or the CPU tier before their lifetime was over, by reason and "
    "TTL class; last_copy='true' if the engine then had none left on either, so that only a "
    "remote tier can still have one. Those last copies are promises not kept: the tier is too "
    "small for its lifetimes.",
    ("tier", "reason", "ttl", "last_copy"),
)
EVICTION_IDLE = Metric(
    "cachescope_eviction_idle_ratio",
    "histogram",
    "Share of its lifetime that an entry had idled for when it left the device or the CPU tier "
    "before its time; times the TTL of the label it is seconds. Mass near 0 is churn: entries go "
    "before anyone could come back for them.",
    ("tier", "reason", "ttl"),
    SHARE_BUCKETS,
)
QUOTA_USED = Metric(
    "cachescope_quota_used_ratio",
    "gauge",
    "How full the fullest quota of the device or the CPU tier is: the largest share of its quota "
    "that any organisation holds. At 1 that organisation evicts its own entries.",
    ("tier",),
)

# The state and the work of tiers.

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
TIER_OPERATION_SECONDS = Metric(
    "cachescope_tier_operation_seconds",
    "histogram",
    "Time that one operation took: of a remote tier one exchange with its store (lookup, load, "
    "store, touch), of the CPU tier one copy (load to the device, store from it); outcome 'ok', "
    "or 'failed' if the store gave an error or missed the deadline.",
    ("tier", "operation", "outcome"),
    STORE_BUCKETS,
)
TIER_BYTES = Metric(
    "cachescope_tier_bytes",
    "counter",
    "Bytes of KV that were moved out of a tier (load) or into it (store).",
    ("tier", "operation"),
)
TIER_INFLIGHT_BYTES = Metric(
    "cachescope_tier_inflight_bytes",
    "gauge",
    "Bytes queued or under way to and from a remote tier, by direction (loading, storing).",
    ("tier", "direction"),
)
TIER_QUEUE = Metric(
    "cachescope_tier_queue_entries",
    "gauge",
    "Chunks that wait for a remote tier or are under way there, by queue (lookup, load, store, "
    "touch). A queue that keeps growing says that the store is too slow for the traffic.",
    ("tier", "queue"),
)
PROMOTIONS = Metric(
    "cachescope_promotions",
    "counter",
    "Chunks brought nearer for a prompt that read them: from a remote tier to the CPU tier, or "
    "from the CPU tier to the device, by the tiers they came from and went to.",
    ("source", "target"),
)
PREFETCHED_CHUNKS = Metric(
    "cachescope_prefetched_chunks",
    "counter",
    "Chunks brought from a remote tier to the CPU tier before a session that waits for a tool "
    "asked for them: loaded; and of these used, or wasted: evicted before.",
    ("outcome",),
)
ENDED_ENTRIES = Metric(
    "cachescope_ended_entries",
    "counter",
    "Entries of sessions and conversations that are known to be over, and that a tier therefore "
    "evicts before others.",
    ("tier",),
)
PROMOTION_WAIT_SECONDS = Metric(
    "cachescope_promotion_wait_seconds",
    "histogram",
    "Time that a prompt whose blocks a remote tier holds waited for room in the CPU tier, by "
    "outcome: at_once, waited; and where it was computed instead late (no room within its bound), "
    "turned_away (none was to be expected within it), tier_lost, cut_off.",
    ("outcome",),
    WAIT_BUCKETS,
)

# The API side.

BREAKS = Metric(
    "cachescope_breaks",
    "counter",
    "Requests that could not read from the cache as far as an earlier request of their session "
    "would have let them, by cause, by the region of the prompt that changed ('none': nothing "
    "did, the cache lost it) and by whether that is as it should be.",
    ("cause", "region", "expected"),
    by_org=True,
    side="api",
)
LOST_TOKENS = Metric(
    "cachescope_lost_tokens",
    "counter",
    "Tokens that those requests had to compute anew because of the break, by the same cause, "
    "region and whether it was expected.",
    ("cause", "region", "expected"),
    by_org=True,
    side="api",
)
UNEXPLAINED_TOKENS = Metric(
    "cachescope_unexplained_tokens",
    "counter",
    "Tokens that were not in the cache for no known reason. Any is a bug to report.",
    side="api",
)
IGNORED_MARKERS = Metric(
    "cachescope_ignored_markers",
    "counter",
    "Cache markers, or fields of them, that did not count as they were written, by reason.",
    ("reason",),
    side="api",
)
REPAIRS = Metric(
    "cachescope_repairs",
    "counter",
    "Requests in which something was put right before they were served, by the kind of repair.",
    ("kind",),
    by_org=True,
    side="api",
)
REPAIRED_TOKENS = Metric(
    "cachescope_repaired_tokens",
    "counter",
    "Tokens that were read and would have been computed anew without a repair, by the kind of the "
    "repair that stands first in the prompt: an estimate, from what the session's earlier requests "
    "would have left as their client sent them.",
    ("kind",),
    by_org=True,
    side="api",
)
REPAIR_FAILURES = Metric(
    "cachescope_repair_failures",
    "counter",
    "Requests that were served as they came because their repair failed: error (a mistake in the "
    "repair), refused (the server refused the repaired request).",
    ("reason",),
    side="api",
)
STAGE_SECONDS = Metric(
    "cachescope_stage_seconds",
    "histogram",
    "Time that caching itself takes of a request on the API side, by stage: 'plan' is what the "
    "engine waited for its plan once the prompt was tokenised, 'boundaries' the rendering and "
    "search for where breakpoints lie, of which most overlaps with tokenising, 'diagnosis' the "
    "comparison with earlier requests, mostly after the reply.",
    ("stage",),
    STAGE_BUCKETS,
    side="api",
)
TOKENIZED_TOKENS = Metric(
    "cachescope_tokenized_tokens",
    "counter",
    "Tokens of prompts that came as text: new (tokenised), known (kept from a prompt that begins "
    "alike, and not tokenised again).",
    ("source",),
    side="api",
)
QUEUED_DIAGNOSES = Metric(
    "cachescope_queued_diagnoses",
    "gauge",
    "Requests that are answered and wait to be diagnosed.",
    side="api",
)

SESSION_NOTES = Metric(
    "cachescope_session_notes",
    "counter",
    "Notes on sessions, which replicas share so that a session that moves keeps its diagnosis: "
    "written, dropped (too long, or too many to write); and questions for those of others: found, "
    "none, late, unavailable (the store does not answer). 'damaged' are notes that somebody has "
    "altered, or that this version cannot read.",
    ("outcome",),
    side="api",
)
LEDGER_RECORDS = Metric(
    "cachescope_ledger_records",
    "counter",
    "Records of requests by what became of them: written, dropped (the queue was full: the "
    "database is away or too slow), failed (the database refused them). There is none without a "
    "ledger.",
    ("outcome",),
    side="api",
)

METRICS = (
    PROMPT_TOKENS,
    REQUESTS,
    QUERY_TOKENS,
    HIT_TOKENS,
    HIT_AGE,
    PREFILL_SECONDS_SAVED,
    PREFILL_RATE,
    INPUT_COST,
    REFUSED_PLANS,
    REFUSED_HINTS,
    RESIDENT_BYTES,
    RESIDENT_ENTRIES,
    EVICTIONS,
    ORG_EVICTIONS,
    EARLY_EVICTIONS,
    EVICTION_IDLE,
    QUOTA_USED,
    TIER_UP,
    TIER_USED_BYTES,
    TIER_CAPACITY_BYTES,
    TIER_KEYS,
    TIER_OPERATION_SECONDS,
    TIER_BYTES,
    TIER_INFLIGHT_BYTES,
    TIER_QUEUE,
    PROMOTIONS,
    PREFETCHED_CHUNKS,
    ENDED_ENTRIES,
    PROMOTION_WAIT_SECONDS,
    BREAKS,
    LOST_TOKENS,
    UNEXPLAINED_TOKENS,
    IGNORED_MARKERS,
    REPAIRS,
    REPAIRED_TOKENS,
    REPAIR_FAILURES,
    STAGE_SECONDS,
    TOKENIZED_TOKENS,
    QUEUED_DIAGNOSES,
    SESSION_NOTES,
    LEDGER_RECORDS,
)
"""All of them."""

ENGINE_METRICS = tuple(metric for metric in METRICS if metric.side == "engine")
"""Those that the engine fills."""
