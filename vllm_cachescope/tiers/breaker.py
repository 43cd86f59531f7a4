"""A circuit breaker: stops asking a store that does not answer, and probes until it does."""

import threading
from collections.abc import Callable


class Breaker:
    """Closed while a store answers; open after several failures in a row.

    While it is open the store is only probed now and then, each time after twice the last pause:
    after 1, 2, 4 seconds. Safe to use from several threads.

    Args:
        failures: failures in a row that open it.
        first_s: time to the first probe, in seconds.
        longest_s: longest time between probes, in seconds.
        clock: seconds, never running backwards.
        random: a number in [0, 1), to keep many engines from probing in step.
    """

    def __init__(
        self,
        failures: int,
        first_s: float,
        longest_s: float,
        clock: Callable[[], float],
        random: Callable[[], float],
    ) -> None:
        self._limit = failures
        self._first_s = first_s
        self._longest_s = longest_s
        self._clock = clock
        self._random = random
        self._lock = threading.Lock()
        self._failures = 0
        self._opened = 0
        self._probe_at = 0.0
        self.closed = True
        self.reason: str | None = None

    def succeeded(self) -> bool:
        """The store answered; return whether that closed the breaker."""
        with self._lock:
            reopened = not self.closed
            self._failures = self._opened = 0
            self.closed = True
            self.reason = None
            return reopened

    def failed(self, reason: str) -> bool:
        """The store did not answer; return whether that opened the breaker."""
        with self._lock:
            self._failures += 1
            if self.closed and self._failures < self._limit:
                return False
            return self._open(reason)

    def trip(self, reason: str) -> bool:
        """Open the breaker at once: more failures would tell nothing new.

        Returns:
            Whether it was closed.
        """
        with self._lock:
            return self._open(reason)

    def probe_in(self) -> float:
        """Return the seconds until the next probe may be made; 0 if it may be made now."""
        with self._lock:
            return 0.0 if self.closed else max(0.0, self._probe_at - self._clock())

    def _open(self, reason: str) -> bool:
        was_closed, self.closed = self.closed, False
        self.reason = reason
        if was_closed:
            self._opened = 0
        elif self._clock() < self._probe_at:
            # What was under way when the breaker opened fails late: no reason to probe later.
            return False
        pause = min(self._longest_s, self._first_s * 2**self._opened)
        self._opened += 1
        self._probe_at = self._clock() + pause * (0.75 + 0.5 * self._random())
        return was_closed
