"""The evictions in the ledger: entries that organisations lost to others, took from others, and
lost to themselves."""

import threading
from collections import Counter
from typing import Any, NamedTuple

from vllm_cachescope.usage.batch import HOUR_S
from vllm_cachescope.usage.name_limits import NameLimits
from vllm_cachescope.usage.names import kept_name

PARTS = ("suffered", "caused", "own")
"""What an organisation has to do with an eviction: its entry made room for another organisation's,
or the other way round; or both were its own."""

MAX_PENDING = 50_000
"""How many sums wait at most while the database is away; what would need further ones is lost."""


class EvictionKey(NamedTuple):
    """What evictions are counted by; ``org`` is an organisation's id."""

    hour: int
    org: str
    model: str
    replica: str
    tier: str
    part: str


class PendingEvictions:
    """Evictions that wait to be written. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[EvictionKey] = Counter()

    def add(
        self, at: float, org: str, model: str, replica: str, tier: str, part: str, entries: int
    ) -> None:
        """Count evictions.

        Args:
            at: when they were told of, in seconds since the epoch.
            org: the id of the organisation that they are counted for.
            model: the model.
            replica: the server.
            tier: the tier that the entries left.
            part: one of `PARTS`.
            entries: how many entries.
        """
        key = EvictionKey(int(at) // HOUR_S * HOUR_S, org, model, replica, tier, part)
        with self._lock:
            if key in self._counts or len(self._counts) < MAX_PENDING:
                self._counts[key] += entries

    def take(self) -> Counter[EvictionKey]:
        """Return what has been counted since the last time."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return counts

    def put_back(self, counts: Counter[EvictionKey]) -> None:
        """Have what `take` returned wait once more."""
        with self._lock:
            self._counts.update(counts)


def rows_of(counts: Counter[EvictionKey], limits: NameLimits) -> list[dict[str, Any]]:
    """Return rows of `tables.EVICTIONS`, with as many names as ``limits`` lets through."""
    rows = []
    for key, entries in counts.items():
        org, _ = limits.admit(key.hour, kept_name(key.org), "", key.org)
        model = limits.admit_model(key.hour, kept_name(key.model))
        rows.append(
            key._asdict()
            | {"org": org, "session": "", "model": model, "replica": kept_name(key.replica)}
            | {"entries": entries}
        )
    return rows
