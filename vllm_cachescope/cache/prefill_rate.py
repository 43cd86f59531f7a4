"""How fast the engine computes prompts, learnt from its steps."""

from collections import deque

LEAST_TOKENS = 128
"""A step with fewer tokens says little: its time hardly depends on them."""

NEWEST_SHARE = 0.3
"""What the newest step counts for in the average."""


class PrefillRate:
    """Follows the engine's steps. A step may begin before the one before it has ended.

    Attributes:
        tokens_per_s: the moving average of the steps' tokens per second; None before the first.
    """

    def __init__(self) -> None:
        self.tokens_per_s: float | None = None
        self._begun: deque[tuple[float, int]] = deque()
        self._last_end = float("-inf")

    def began(self, now: float, tokens: int) -> None:
        """A step of ``tokens`` tokens began at ``now``, in seconds."""
        self._begun.append((now, tokens))

    def ended(self, now: float) -> None:
        """The first step that had not ended yet ended at ``now``, in seconds."""
        if not self._begun:
            return
        began, tokens = self._begun.popleft()
        seconds = now - max(began, self._last_end)
        self._last_end = now
        if tokens < LEAST_TOKENS or seconds <= 0:
            return
        newest = tokens / seconds
        known = self.tokens_per_s or newest
        self.tokens_per_s = known + NEWEST_SHARE * (newest - known)

    def seconds(self, tokens: int) -> float:
        """Return how long computing ``tokens`` tokens would take, in seconds; 0 if that is not
        known."""
        return tokens / self.tokens_per_s if self.tokens_per_s else 0.0
