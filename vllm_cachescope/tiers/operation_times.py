"""The times that a remote tier's exchanges with its store took."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from vllm_cachescope.metrics import STORE_BUCKETS
from vllm_cachescope.observations import Observations


class OperationTimes:
    """Times of a tier's operations, by whether they succeeded. Safe to use from several threads.

    Args:
        tier: the tier's name.
    """

    def __init__(self, tier: str) -> None:
        self._tier = tier
        self._times = Observations(STORE_BUCKETS)
        self._lock = threading.Lock()

    @contextmanager
    def measure(self, operation: str) -> Iterator[None]:
        """Measure what is done inside; what raises an exception has failed."""
        # The thread's own time and not the tier's clock, which tests may hold.
        began, outcome = time.perf_counter(), "failed"
        try:
            yield
            outcome = "ok"
        finally:
            seconds = time.perf_counter() - began
            with self._lock:
                self._times.add(seconds, (self._tier, operation, outcome))

    def take(self) -> Observations:
        """Return the times since the last `take`."""
        with self._lock:
            times, self._times = self._times, Observations(STORE_BUCKETS)
        return times
