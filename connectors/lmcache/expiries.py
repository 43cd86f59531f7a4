"""When the entries of a store expire, as far as this engine knows."""

import heapq
import threading

from vllm_cachescope.connectors.lmcache.adapters import Entry

UNREADABLE = 0
"""The expiry of an entry whose record is damaged: it is never alive, and goes."""


class Expiries:
    """Expiry times in ms of Unix time, by entry. Safe to use from several threads.

    What is in here was read from the store or written to it. Other engines may have let an entry
    live longer since; none lets it live shorter.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._times: dict[Entry, int] = {}
        # An item for each entry at least, with a time that it had once.
        self._order: list[tuple[int, Entry]] = []

    def __len__(self) -> int:
        return len(self._times)

    def __contains__(self, entry: Entry) -> bool:
        return entry in self._times

    def of(self, entry: Entry) -> int:
        """Return when ``entry`` expires; 0 if that is not known."""
        return self._times.get(entry, 0)

    def learn(self, entry: Entry, expires_ms: int) -> None:
        """The record of ``entry`` says this."""
        with self._lock:
            if expires_ms < self._times.get(entry, expires_ms + 1):
                heapq.heappush(self._order, (expires_ms, entry))
            self._times[entry] = expires_ms

    def forget(self, entry: Entry) -> None:
        """There is no such entry."""
        with self._lock:
            self._times.pop(entry, None)

    def take_expired(self, now_ms: int, limit: int) -> list[tuple[Entry, int]]:
        """Forget entries that have expired, and return them with the time; ``limit`` at most."""
        expired: list[tuple[Entry, int]] = []
        with self._lock:
            while self._order and self._order[0][0] <= now_ms and len(expired) < limit:
                _, entry = heapq.heappop(self._order)
                expires_ms = self._times.get(entry)
                if expires_ms is None:
                    continue
                if expires_ms > now_ms:
                    heapq.heappush(self._order, (expires_ms, entry))
                else:
                    del self._times[entry]
                    expired.append((entry, expires_ms))
        return expired

    def beginning_with(self, prefix: bytes) -> list[Entry]:
        """Return the entries, of whatever namespace, whose key begins with ``prefix``."""
        with self._lock:
            return [entry for entry in self._times if entry.key.startswith(prefix)]
