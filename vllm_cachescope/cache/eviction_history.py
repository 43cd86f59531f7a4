"""The history of evictions: why blocks that were cached once are no longer cached."""

from collections import OrderedDict
from dataclasses import dataclass
from enum import StrEnum

MAX_RECORDS = 200_000
"""How many evicted blocks are remembered: some 40 MB."""


class EvictionReason(StrEnum):
    """Why a block left a tier."""

    TTL = "ttl"
    CAPACITY = "capacity"
    QUOTA = "quota"
    PURGE = "purge"
    RESET = "reset"


@dataclass(frozen=True, slots=True)
class EvictionRecord:
    """How a block left the last tier that held it.

    Attributes:
        reason: why the block left.
        ttl_s: the lifetime that the block had, in seconds.
        at: when the block left, in seconds on the ledger's clock; for an expiry, the end of the
            block's lifetime and not the moment when the expiry was noticed.
        tier: name of the tier, such as ``device``.
    """

    reason: EvictionReason
    ttl_s: int
    at: float
    tier: str


class EvictionHistory:
    """The most recent evictions, by block key.

    Args:
        limit: how many evictions are remembered; the oldest ones are dropped first.
    """

    def __init__(self, limit: int = MAX_RECORDS) -> None:
        self._limit = limit
        # No `cachetools.FIFOCache`: it takes twice the memory and hides its oldest item.
        self._records: OrderedDict[bytes, EvictionRecord] = OrderedDict()
        self._is_complete = True

    def __len__(self) -> int:
        return len(self._records)

    def record(self, key: bytes, eviction: EvictionRecord) -> None:
        """Note that the block ``key`` was evicted, in place of its earlier record."""
        self._records.pop(key, None)
        self._records[key] = eviction
        if len(self._records) > self._limit:
            self._records.popitem(last=False)
            self._is_complete = False

    def find(self, key: bytes) -> EvictionRecord | None:
        """Return how the block ``key`` was evicted; None if it never was, or too long ago."""
        return self._records.get(key)

    @property
    def since(self) -> float | None:
        """When the oldest eviction happened that is still remembered, in seconds on the ledger's
        clock; None if all evictions are."""
        if self._is_complete or not self._records:
            return None
        return next(iter(self._records.values())).at

    def drop(self, key: bytes) -> None:
        """Drop the record of the block ``key``: it is cached again."""
        self._records.pop(key, None)
