"""The counts of keys that a remote tier looked up, loaded, stored and evicted, by outcome."""

import threading
from collections import Counter
from collections.abc import Mapping


class KeyCounts:
    """Numbers of keys by operation and outcome. Safe to use from several threads.

    ``("load", "late")`` counts keys that did not arrive by their deadline; under the operation
    ``evict`` the outcome is the reason: ``("evict", "quota")``.
    """

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()

    def add(self, operation: str, outcome: str, keys: int = 1) -> None:
        """Count ``keys`` more keys; 0 leaves no trace."""
        if keys:
            with self._lock:
                self._counts[operation, outcome] += keys

    def update(self, counts: Mapping[tuple[str, str], int]) -> None:
        """Add ``counts``; an outcome with 0 keys appears in the next `take`."""
        with self._lock:
            self._counts.update(counts)

    def take(self) -> Counter[tuple[str, str]]:
        """Return the numbers since the last `take`."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return counts
