"""The budget of purges: how often an account may purge."""

from collections.abc import Callable

from cachetools import TTLCache

BURST = 60
"""Purges that an account may make at once."""

PER_SECOND = 1.0
"""Purges that an account may make after that, per second."""

MAX_ACCOUNTS = 10_000
"""Accounts that are kept; beyond that the one that has purged least recently starts afresh."""


class PurgeBudget:
    """A token bucket for each account.

    Args:
        clock: seconds, never running backwards.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        # What is left, and when that was so. A bucket that nobody has used for so long is full.
        self._left: TTLCache[str, tuple[float, float]] = TTLCache(
            MAX_ACCOUNTS, BURST / PER_SECOND, timer=clock
        )

    def take(self, account: str) -> float:
        """Take one purge out of an account's budget.

        Args:
            account: see `CallerDirectory.account`.

        Returns:
            0, or how long the account has to wait, in seconds; nothing is taken then.
        """
        now = self._clock()
        left, at = self._left.get(account, (BURST, now))
        left = min(BURST, left + (now - at) * PER_SECOND)
        if left < 1:
            return (1 - left) / PER_SECOND
        self._left[account] = left - 1, now
        return 0.0
