"""Why a block that was cached is cached no longer."""

from collections import OrderedDict
from dataclasses import dataclass

from vllm_cachescope.ledger import Reason

REMEMBERED_DEPARTURES = 200_000
"""How many departed blocks are remembered: some 40 MB."""


@dataclass(frozen=True, slots=True)
class Departure:
    """How a block left the last tier that held it.

    Attributes:
        reason: why.
        ttl_s: the lifetime it had, in seconds.
        at: when, in seconds on the ledger's clock; for an expiry, the end of its lifetime and
            not the moment when that was noticed.
    """

    reason: Reason
    ttl_s: int
    at: float


class Departures:
    """The most recent departures, by block key."""

    def __init__(self, limit: int = REMEMBERED_DEPARTURES) -> None:
        self._limit = limit
        self._departures: OrderedDict[bytes, Departure] = OrderedDict()

    def __len__(self) -> int:
        return len(self._departures)

    def record(self, key: bytes, departure: Departure) -> None:
        """Note that the block ``key`` is gone; its last departure counts."""
        self._departures.pop(key, None)
        self._departures[key] = departure
        if len(self._departures) > self._limit:
            self._departures.popitem(last=False)

    def find(self, key: bytes) -> Departure | None:
        """Return how the block ``key`` went; None if it never came, or went too long ago."""
        return self._departures.get(key)

    def returned(self, key: bytes) -> None:
        """Note that the block ``key`` is cached again."""
        self._departures.pop(key, None)
