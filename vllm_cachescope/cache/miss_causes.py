"""The causes of cache misses that the engine and its tiers know."""

from dataclasses import dataclass
from enum import StrEnum

from vllm_cachescope.cache.eviction_history import EvictionReason, EvictionRecord


class MissCause(StrEnum):
    """Why tokens that an earlier request had were not in the cache."""

    EXPIRED = "expired"
    EVICTED = "evicted"
    NEVER_STORED = "never_stored"
    CUT_OFF = "cut_off"
    SCOPE_CHANGED = "scope_changed"
    TIER_UNAVAILABLE = "tier_unavailable"
    TIMED_OUT = "timed_out"
    ENGINE_RESTARTED = "engine_restarted"
    OTHER_REPLICA = "other_replica"
    HASH_SETTINGS_DIFFER = "hash_settings_differ"
    RENDERED_DIFFERENTLY = "rendered_differently"
    NOT_LOOKED_UP = "not_looked_up"
    PARTIAL_BLOCK = "partial_block"
    NO_CHECKPOINT = "no_checkpoint"
    UNKNOWN = "unknown"


NO_ROOM = "no room in the CPU tier"
"""Begins the detail of a miss for which the CPU tier was too small, or too full for too long."""


@dataclass(frozen=True, slots=True)
class CacheMiss:
    """Tokens that the engine looked for and did not find, or could not have kept.

    Attributes:
        cause: why they were missed.
        tokens: how many tokens. Those behind a missing block count too, since a cached prefix
            ends at the first block that is missing.
        tier: name of the tier that knows the cause; None if none does.
        ttl_s: the lifetime that their blocks had, in seconds; None if it is not known.
        age_s: seconds since their blocks expired or were evicted; None if that is not known.
        detail: what else is known, in a few words: "not covered by a breakpoint".
        replica: the name in ``detail`` of the server that had them, which is the operator's to
            know; None if there is none.
    """

    cause: MissCause
    tokens: int
    tier: str | None = None
    ttl_s: int | None = None
    age_s: float | None = None
    detail: str | None = None
    replica: str | None = None

    def continues(self, other: "CacheMiss") -> bool:
        """Whether both have the same cause, tier, TTL and detail; their ages may differ."""
        # Field by field, since the engine compares the misses of thousands of blocks.
        return (
            self.cause is other.cause
            and self.tier == other.tier
            and self.ttl_s == other.ttl_s
            and self.detail == other.detail
        )


_DETAILS = {
    EvictionReason.QUOTA: "the organisation's quota was full",
    EvictionReason.PURGE: "it was purged",
    EvictionReason.RESET: "the cache was reset",
}


def eviction_miss(eviction: EvictionRecord, tokens: int, now: float) -> CacheMiss:
    """Return the miss of ``tokens`` tokens whose block was evicted.

    Args:
        eviction: how the block was evicted.
        tokens: how many tokens were missed.
        now: the time in seconds, on the ledger's clock.
    """
    expired = eviction.reason is EvictionReason.TTL
    return CacheMiss(
        MissCause.EXPIRED if expired else MissCause.EVICTED,
        tokens,
        eviction.tier,
        eviction.ttl_s,
        now - eviction.at,
        _DETAILS.get(eviction.reason),
    )
