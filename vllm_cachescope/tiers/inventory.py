"""The inventory of a remote tier: the entries that one engine has stored there, for routers."""

import threading
from collections.abc import Callable, Iterable
from typing import NamedTuple

from vllm_cachescope.cache.expiry_queue import ExpiryQueue

MAX_ENTRIES = 100_000
"""How many entries are kept for each tier: some 20 MB, and vLLM keeps the tokens of each. Of more
the first to expire are told to be gone."""

_AT_ONCE = 1000  # keys that a purge drops under the lock, some tenths of a millisecond


class Change(NamedTuple):
    """A change of the inventory.

    Attributes:
        keys: the entries; see `keyspace.qualified`.
        removed: whether they are gone; otherwise they were stored.
    """

    keys: list[bytes]
    removed: bool


class Inventory:
    """What an engine has stored in a tier and, as far as it knows, is there still.

    Each change is told once. What other engines have stored is theirs to tell, and an entry whose
    life another engine prolongs counts as gone when this engine's own use of it is over. Safe for
    several threads.

    Args:
        clock: the tier's clock, in seconds.
        limit: how many entries are kept.
    """

    def __init__(self, clock: Callable[[], float], limit: int = MAX_ENTRIES) -> None:
        self._clock = clock
        self._limit = limit
        self._lock = threading.Lock()
        # Under the lock.
        self._held: ExpiryQueue[bytes, float] = ExpiryQueue()
        self._changes: list[Change] = []

    def stored(self, entries: Iterable[tuple[bytes, float]]) -> None:
        """Note that entries were stored.

        Args:
            entries: their keys, each with when it expires, in seconds.
        """
        with self._lock:
            self._drop_expired()
            new = []
            for key, expires_at in entries:
                if key not in self._held:
                    new.append(key)
                self._prolong(key, expires_at)
            self._change(new, removed=False)
            excess = len(self._held) - self._limit
            self._change([self._held.pop()[0] for _ in range(excess)], removed=True)

    def touch(self, entries: Iterable[tuple[bytes, float]]) -> None:
        """Note that entries live until a later time; one that is not held is ignored.

        Args:
            entries: their keys, each with when it expires now, in seconds.
        """
        with self._lock:
            for key, expires_at in entries:
                if key in self._held:
                    self._prolong(key, expires_at)

    def gone(self, keys: Iterable[bytes]) -> None:
        """Note that ``keys`` are not in the store any more."""
        with self._lock:
            self._drop([key for key in keys if key in self._held])

    def purged(self, prefix: bytes) -> None:
        """Note that the entries are gone whose owner begins with ``prefix``.

        The scheduler's thread takes the lock, too: it is not held while all keys are looked at, nor
        while many are dropped. What the owner stores meanwhile stays.
        """
        with self._lock:
            held = list(self._held)
        owned = [key for key in held if key.startswith(prefix)]
        for first in range(0, len(owned), _AT_ONCE):
            self.gone(owned[first : first + _AT_ONCE])

    @property
    def has_changes(self) -> bool:
        """Whether `take_changes` returns anything."""
        with self._lock:
            self._drop_expired()
            return bool(self._changes)

    def take_changes(self) -> list[Change]:
        """Return the changes since the last call, in order."""
        with self._lock:
            self._drop_expired()
            changes, self._changes = self._changes, []
            return changes

    def held(self) -> list[bytes]:
        """Return the keys that are held."""
        with self._lock:
            self._drop_expired()
            return list(self._held)

    def _prolong(self, key: bytes, expires_at: float) -> None:
        self._held.set(key, max(expires_at, self._held.time_of(key) or expires_at))

    def _drop_expired(self) -> None:
        self._change([key for key, _ in self._held.pop_expired(self._clock())], removed=True)

    def _drop(self, keys: list[bytes]) -> None:
        for key in keys:
            self._held.drop(key)
        self._change(keys, removed=True)

    def _change(self, keys: list[bytes], removed: bool) -> None:
        if keys:
            self._changes.append(Change(keys, removed))
