"""Keys in the order in which they expire."""

from collections.abc import Iterator
from heapq import heapify, heappop, heappush, heapreplace
from typing import Any, Generic, TypeVar

Key = TypeVar("Key", bound=Any)
"""Hashable and orderable: of keys that expire at the same time the smallest comes first."""

Time = TypeVar("Time", int, float)
"""Seconds, or milliseconds; the queue only compares times."""


class ExpiryQueue(Generic[Key, Time]):
    """Keys, each with the time at which it expires, the first to expire first.

    A key's time may move to later or to sooner. Moving to later, the common case, costs O(1);
    the heap is put in order when the key comes to its head. Not safe for several threads.
    """

    def __init__(self) -> None:
        self._times: dict[Key, Time] = {}
        # Of each key at least one item, with its time or a sooner one that it had before. Items of
        # dropped keys may remain.
        self._heap: list[tuple[Time, Key]] = []

    def __len__(self) -> int:
        return len(self._times)

    def __contains__(self, key: Key) -> bool:
        return key in self._times

    def __iter__(self) -> Iterator[Key]:
        return iter(self._times)

    def time_of(self, key: Key) -> Time | None:
        """Return when ``key`` expires; None if it is not in the queue."""
        return self._times.get(key)

    def set(self, key: Key, expires_at: Time) -> None:
        """Put ``key`` into the queue, or give it another time."""
        known = self._times.get(key)
        self._times[key] = expires_at
        if known is None or expires_at < known:
            heappush(self._heap, (expires_at, key))
            if len(self._heap) > 2 * len(self._times) + 16:
                self._heap = [(at, key) for key, at in self._times.items()]
                heapify(self._heap)

    def drop(self, key: Key) -> None:
        """Drop ``key``; one that is not in the queue is ignored."""
        self._times.pop(key, None)

    def first(self) -> Time | None:
        """Return when the first key expires; None if the queue is empty."""
        while self._heap:
            at, key = self._heap[0]
            expires_at = self._times.get(key)
            if expires_at is None or expires_at < at:
                heappop(self._heap)
            elif expires_at > at:
                heapreplace(self._heap, (expires_at, key))
            else:
                return expires_at
        return None

    def pop(self) -> tuple[Key, Time]:
        """Take the first key to expire out of the queue; return it with its time.

        Raises:
            IndexError: if the queue is empty.
        """
        self.first()
        expires_at, key = heappop(self._heap)
        del self._times[key]
        return key, expires_at

    def pop_expired(self, now: Time) -> Iterator[tuple[Key, Time]]:
        """Take keys that expire at ``now`` or before out of the queue, one by one as the caller
        asks for them; yield each with its time."""
        while (first := self.first()) is not None and first <= now:
            yield self.pop()
