"""The counts of the scheduler side since the engine last reported to vLLM's metrics."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats

from vllm_cachescope.cache.eviction_history import EvictionReason
from vllm_cachescope.cache.ledger import Entry
from vllm_cachescope.cache.report import Outcome, Report, tier_read
from vllm_cachescope.connectors.vllm.engine.pressure import Pressure
from vllm_cachescope.connectors.vllm.engine.stats import move_observations
from vllm_cachescope.connectors.vllm.engine.tiers.cpu_policy import CPU
from vllm_cachescope.connectors.vllm.engine.tiers.device import DEVICE
from vllm_cachescope.durations import format_duration
from vllm_cachescope.metrics import (
    EARLY_EVICTIONS,
    ENDED_ENTRIES,
    EVICTION_IDLE,
    EVICTIONS,
    HIT_AGE,
    HIT_TOKENS,
    INPUT_COST,
    PREFETCHED_CHUNKS,
    PREFILL_SECONDS_SAVED,
    PROMOTIONS,
    PROMPT_TOKENS,
    QUERY_TOKENS,
    REFUSED_HINTS,
    REFUSED_PLANS,
    REQUESTS,
    SHARE_BUCKETS,
)
from vllm_cachescope.observations import Observations
from vllm_cachescope.prompt.plan_hint import Refusal
from vllm_cachescope.tenancy.org_labels import NO_ORG_LABELS
from vllm_cachescope.usage.prices import Multipliers

Org = tuple[str, ...]
"""The label of an organisation; empty where metrics do not tell organisations apart."""


Read = tuple[bool, int, float]
"""A block that is read: whether on the device (or else in the CPU tier), its TTL in seconds, and
when it would have expired, in seconds on the ledger's clock."""


class Prefetched(StrEnum):
    """What became of a chunk that was brought into the CPU tier before it was asked for: it has
    come, and then was used, or was evicted unused."""

    LOADED = "loaded"
    USED = "used"
    WASTED = "wasted"


@dataclass(slots=True)
class Counts:
    """What happened since the last report, by the labels of the metrics. TTLs are in seconds.

    Attributes:
        multipliers: what a token costs that is read or created.
        tokens: prompt tokens by outcome, scope, TTL (0 where none is covered) and organisation.
        requests: prompts by whether they read, and organisation.
        saved_s: seconds of prefill that reads saved, by tier and organisation.
        hit_ages: shares of their lifetimes after which blocks were read, by tier and TTL.
        evictions: entries that left the device or the CPU tier, by tier and reason.
        early: those that left before their time, by tier, reason, TTL and whether no other copy
            was left.
        idle: shares of their lifetimes for which these had idled, by tier, reason and TTL.
        promotions: chunks that were brought nearer, by the tiers they came from and went to.
        retired: entries of conversations that are over, by tier.
        prefetched: chunks brought into the CPU tier before they were asked for, by what became of
            them.
        pressure: evictions by the organisations that suffered and caused them.
        refused_plans: prompts that came with a plan that is not genuine.
        refused_hints: prompts whose hint of a plan did not count, by reason.
    """

    multipliers: Multipliers = field(default_factory=Multipliers)
    pressure: Pressure = field(default_factory=lambda: Pressure(NO_ORG_LABELS))
    tokens: Counter[tuple[str, str, int, Org]] = field(default_factory=Counter)
    requests: Counter[tuple[str, Org]] = field(default_factory=Counter)
    saved_s: dict[tuple[str, Org], float] = field(default_factory=dict)
    hit_ages: Observations = field(default_factory=lambda: Observations(SHARE_BUCKETS))
    evictions: Counter[tuple[str, EvictionReason]] = field(default_factory=Counter)
    early: Counter[tuple[str, EvictionReason, int, bool]] = field(default_factory=Counter)
    idle: Observations = field(default_factory=lambda: Observations(SHARE_BUCKETS))
    promotions: Counter[tuple[str, str]] = field(default_factory=Counter)
    retired: Counter[str] = field(default_factory=Counter)
    prefetched: Counter[Prefetched] = field(default_factory=Counter)
    refused_plans: int = 0
    refused_hints: Counter[str] = field(default_factory=Counter)
    _is_new: bool = True

    def add_report(self, report: Report, org: Org) -> None:
        """Count what became of a prompt of ``org``."""
        for row in report.rows:
            self.tokens[row.outcome, row.scope.label, row.ttl_s, org] += row.tokens
        read = report.read_by_tier
        outcome = "read" if read else "created" if report.created_by_ttl else "neither"
        self.requests[outcome, org] += 1
        if report.prefill_seconds_saved and read:
            per_token_s = report.prefill_seconds_saved / sum(read.values())
            for tier, tokens in read.items():
                before_s = self.saved_s.get((tier, org), 0.0)
                self.saved_s[tier, org] = before_s + tokens * per_token_s

    def add_reads(self, reads: Mapping[Read, int], now: float, are_promoted: bool) -> None:
        """Count blocks that a prompt reads.

        Args:
            reads: how many blocks, by how they were before.
            now: the time in seconds.
            are_promoted: whether some came from a remote tier, which made them young: then only
                those on the device tell their ages.
        """
        for (on_device, ttl_s, expires_at), blocks in reads.items():
            if on_device or not are_promoted:
                labels = DEVICE if on_device else CPU, format_duration(ttl_s)
                self.hit_ages.add(1 - (expires_at - now) / ttl_s, labels, blocks)

    def add_eviction(
        self,
        tier: str,
        reason: EvictionReason,
        entry: Entry,
        now: float,
        was_last: bool,
        by: bytes | None = None,
    ) -> None:
        """Count an entry that left a tier.

        Args:
            tier: the tier.
            reason: why it left.
            entry: the entry, as it was.
            now: the time in seconds, on the ledger's clock.
            was_last: whether neither the device nor the CPU tier holds it any more.
            by: the tag of the organisation whose blocks needed the room; None if that is not known.
        """
        self.evictions[tier, reason] += 1
        if (left_s := entry.expires_at - now) > 0:
            self.early[tier, reason, entry.ttl_s, was_last] += 1
            self.pressure.add(tier, reason, entry.owner, by)
            labels = tier, str(reason), format_duration(entry.ttl_s)
            self.idle.add(1 - left_s / entry.ttl_s, labels)

    def move_to(self, stats: OffloadingConnectorStats) -> None:
        """Add the counts to ``stats`` and begin again at zero."""
        self._move_tokens(stats)
        for (outcome, org), requests in self.requests.items():
            stats.increase_counter(REQUESTS.name, requests, (outcome, *org))
        for (tier, org), seconds in self.saved_s.items():
            stats.increase_counter(PREFILL_SECONDS_SAVED.name, seconds, (tier, *org))
        for (tier, reason), entries in self.evictions.items():
            stats.increase_counter(EVICTIONS.name, entries, (tier, str(reason)))
        for (tier, reason, ttl_s, was_last), entries in self.early.items():
            labels = tier, str(reason), format_duration(ttl_s), str(was_last).lower()
            stats.increase_counter(EARLY_EVICTIONS.name, entries, labels)
        for tiers, chunks in self.promotions.items():
            stats.increase_counter(PROMOTIONS.name, chunks, tiers)
        for tier, entries in self.retired.items():
            stats.increase_counter(ENDED_ENTRIES.name, entries, (tier,))
        for outcome, chunks in self.prefetched.items():
            stats.increase_counter(PREFETCHED_CHUNKS.name, chunks, (outcome.value,))
        for refusal, prompts in self.refused_hints.items():
            stats.increase_counter(REFUSED_HINTS.name, prompts, (refusal,))
        if self.refused_plans or self._is_new:
            # A counter that is not there before it counts looks to Prometheus as if it never rose.
            stats.increase_counter(REFUSED_PLANS.name, self.refused_plans)
        if self._is_new:
            for each in Refusal:
                stats.increase_counter(REFUSED_HINTS.name, 0, (each.value,))
            for tier in (DEVICE, CPU):
                stats.increase_counter(ENDED_ENTRIES.name, 0, (tier,))
            for outcome in Prefetched:
                stats.increase_counter(PREFETCHED_CHUNKS.name, 0, (outcome.value,))
            self._is_new = False
        self.pressure.move_to(stats)
        move_observations(self.hit_ages, HIT_AGE, stats)
        move_observations(self.idle, EVICTION_IDLE, stats)
        for counts in (self.requests, self.saved_s, self.evictions, self.early, self.promotions):
            counts.clear()
        self.retired.clear()
        self.prefetched.clear()
        self.refused_hints.clear()
        self.refused_plans = 0

    def _move_tokens(self, stats: OffloadingConnectorStats) -> None:
        prompts: Counter[Org] = Counter()
        costs: dict[Org, float] = {}
        for (outcome, scope, ttl_s, org), tokens in self.tokens.items():
            ttl = format_duration(ttl_s) if ttl_s else "none"
            stats.increase_counter(PROMPT_TOKENS.name, tokens, (outcome, scope, ttl, *org))
            prompts[org] += tokens
            price = 1.0
            if (tier := tier_read(outcome)) is not None:
                stats.increase_counter(HIT_TOKENS.name, tokens, (tier,))
                price = self.multipliers.read
            elif outcome == Outcome.CREATED:
                price = self.multipliers.of_write(ttl_s)
            costs[org] = costs.get(org, 0.0) + tokens * price
        for org, tokens in prompts.items():
            stats.increase_counter(QUERY_TOKENS.name, tokens)
            stats.increase_counter(INPUT_COST.name, tokens, ("without", *org))
            stats.increase_counter(INPUT_COST.name, costs[org], ("with", *org))
        self.tokens.clear()
