"""The expiry times of a store's entries, as far as this engine knows them."""

import threading
from itertools import islice

from vllm_cachescope.cache.expiry_queue import ExpiryQueue
from vllm_cachescope.connectors.lmcache.adapters import Entry

UNREADABLE = 0
"""The expiry of an entry whose lease is damaged or forged: it is never alive, and is dropped."""


class Expiries:
    """Expiry times in ms of Unix time, by entry. Safe to use from several threads.

    The times were read from records in the store, or written there. Other engines may have let an
    entry live longer since; none lets it live shorter.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queue = ExpiryQueue[Entry, int]()

    def __contains__(self, entry: Entry) -> bool:
        with self._lock:
            return entry in self._queue

    def of(self, entry: Entry) -> int:
        """Return when ``entry`` expires; 0 if that is not known."""
        with self._lock:
            return self._queue.time_of(entry) or 0

    def is_unreadable(self, entry: Entry) -> bool:
        """Whether the record of ``entry`` is known to be damaged."""
        with self._lock:
            return self._queue.time_of(entry) == UNREADABLE

    def learn(self, entry: Entry, expires_ms: int) -> None:
        """Note the time that the record of ``entry`` says."""
        with self._lock:
            self._queue.set(entry, expires_ms)

    def drop(self, entry: Entry) -> None:
        """Note that there is no such entry."""
        with self._lock:
            self._queue.drop(entry)

    def pop_expired(self, now_ms: int, limit: int) -> list[tuple[Entry, int]]:
        """Drop up to ``limit`` entries that have expired; return them with their times."""
        with self._lock:
            return list(islice(self._queue.pop_expired(now_ms), limit))

    def beginning_with(self, prefix: bytes) -> list[Entry]:
        """Return the entries, of whatever namespace, whose key begins with ``prefix``."""
        with self._lock:
            return [entry for entry in self._queue if entry.key.startswith(prefix)]
