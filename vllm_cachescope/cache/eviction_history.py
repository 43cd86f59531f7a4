"""Why a block that was cached is cached no longer."""

from collections import OrderedDict
from dataclasses import dataclass

from vllm_cachescope.cache.ledger import Reason

REMEMBERED_DEPARTURES = 200_000
"""How many departed blocks are remembered: some 40 MB."""


@dataclass(frozen=True, slots=True)
class EvictionRecord:
    """How a block left the last tier that held it.

    Attributes:
        reason: why.
        ttl_s: the lifetime it had, in seconds.
        at: when, in seconds on the ledger's clock; for an expiry, the end of its lifetime and
            not the moment when that was noticed.
        tier: the tier that it left.
    """

    reason: Reason
    ttl_s: int
    at: float
    tier: str


class EvictionHistory:
    """The most recent departures, by block key."""

    def __init__(self, limit: int = REMEMBERED_DEPARTURES) -> None:
        self._limit = limit
        self._departures: OrderedDict[bytes, EvictionRecord] = OrderedDict()
        self._forgotten = False

    def __len__(self) -> int:
        return len(self._departures)

    def record(self, key: bytes, departure: EvictionRecord) -> None:
        """Note that the block ``key`` is gone; its last departure counts."""
        self._departures.pop(key, None)
        self._departures[key] = departure
        if len(self._departures) > self._limit:
            self._departures.popitem(last=False)
            self._forgotten = True

    def find(self, key: bytes) -> EvictionRecord | None:
        """Return how the block ``key`` went; None if it never came, or went too long ago."""
        return self._departures.get(key)

    @property
    def since(self) -> float | None:
        """When the oldest departure was that is still known; None if none was forgotten."""
        if not self._forgotten or not self._departures:
            return None
        return next(iter(self._departures.values())).at

    def returned(self, key: bytes) -> None:
        """Note that the block ``key`` is cached again."""
        self._departures.pop(key, None)
