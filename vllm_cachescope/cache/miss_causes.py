"""Why tokens that an earlier request had were not read: what the engine and its tiers know."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from vllm_cachescope.cache.ledger import Reason


class MissCause(StrEnum):
    """Why tokens that some earlier request had were not in the cache."""

    EXPIRED = "expired"
    EVICTED = "evicted"
    NEVER_STORED = "never_stored"
    TIER_UNAVAILABLE = "tier_unavailable"
    TIMED_OUT = "timed_out"
    ENGINE_RESTARTED = "engine_restarted"
    OTHER_REPLICA = "other_replica"
    HASH_SETTINGS_DIFFER = "hash_settings_differ"
    RENDERED_DIFFERENTLY = "rendered_differently"
    NOT_LOOKED_UP = "not_looked_up"
    PARTIAL_BLOCK = "partial_block"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class CacheMiss:
    """Tokens the engine looked for and did not find, or could not have kept.

    Attributes:
        cause: why.
        tokens: how many. What follows a missing block counts, since no prefix reaches it.
        tier: the tier that knows, if one does.
        ttl_s: the lifetime that they had, in seconds, where one is known.
        age_s: seconds since they expired or were evicted.
        detail: what else is known, in a few words: "not covered by a breakpoint".
    """

    cause: MissCause
    tokens: int
    tier: str | None = None
    ttl_s: int | None = None
    age_s: float | None = None
    detail: str | None = None

    def continues(self, other: "CacheMiss") -> bool:
        """Whether ``other`` is the same of further tokens, at whatever time that was."""
        return replace(self, tokens=0, age_s=None) == replace(other, tokens=0, age_s=None)

    def to_wire(self) -> list[Any]:
        """Return it as plain data."""
        return [str(self.cause), self.tokens, self.tier, self.ttl_s, self.age_s, self.detail]

    @classmethod
    def from_wire(cls, data: Sequence[Any]) -> "CacheMiss":
        """Return what `to_wire` made."""
        return cls(MissCause(data[0]), *data[1:])


_DETAILS = {
    Reason.QUOTA: "the organisation's quota was full",
    Reason.PURGE: "it was purged",
    Reason.RESET: "the cache was reset",
}


def departed(reason: Reason, tokens: int, tier: str | None, ttl_s: int, age_s: float) -> CacheMiss:
    """Return the miss of tokens that left ``tier`` for ``reason``, ``age_s`` seconds ago."""
    cause = MissCause.EXPIRED if reason is Reason.TTL else MissCause.EVICTED
    return CacheMiss(cause, tokens, tier, ttl_s, age_s, _DETAILS.get(reason))
