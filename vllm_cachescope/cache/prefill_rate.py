"""The rate at which the engine computes prompts, learnt from its steps."""

from collections import deque

MIN_TOKENS = 128
"""Steps with fewer tokens are left out: how long they take hardly depends on the tokens."""

NEWEST_WEIGHT = 0.3
"""The weight of the newest step in the moving average."""


class PrefillRate:
    """A moving average over the engine's steps. A step may begin before the last one has ended.

    Attributes:
        tokens_per_s: the average of the steps' tokens per second; None before the first step.
        short_step_s: how long a step with fewer tokens than `MIN_TOKENS` takes, in seconds, on
            average; 0 before the first one.
    """

    def __init__(self) -> None:
        self.tokens_per_s: float | None = None
        self.short_step_s = 0.0
        self._under_way: deque[tuple[float, int]] = deque()
        self._last_end = float("-inf")

    def step_began(self, now: float, tokens: int) -> None:
        """Note that a step of ``tokens`` tokens began at ``now``, in seconds."""
        self._under_way.append((now, tokens))

    def step_ended(self, now: float) -> None:
        """Note that the oldest step under way ended at ``now``, in seconds."""
        if not self._under_way:
            return
        began, tokens = self._under_way.popleft()
        seconds = now - max(began, self._last_end)
        self._last_end = now
        if tokens == 0 or seconds <= 0:
            return
        if tokens < MIN_TOKENS:
            known = self.short_step_s or seconds
            self.short_step_s = known + NEWEST_WEIGHT * (seconds - known)
            return
        newest = tokens / seconds
        average = self.tokens_per_s or newest
        self.tokens_per_s = average + NEWEST_WEIGHT * (newest - average)

    def seconds_for(self, tokens: int) -> float:
        """Return how long the engine takes to compute ``tokens`` tokens, in seconds; 0 before the
        first step."""
        return tokens / self.tokens_per_s if self.tokens_per_s else 0.0
