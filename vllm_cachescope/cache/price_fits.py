"""Price fits: when prices are made anew from what was counted, and taken over."""

from collections.abc import Callable

from vllm_cachescope.cache.return_counts import Counted, ReturnCounts
from vllm_cachescope.cache.return_prices import RECENCY, Prices, fit_prices

_FIRST_FIT, _FIT_EVERY = 32, 256
_FADE = 0.98
"""What is left of the counts after each fit: half of them after 9,000 requests."""


class PriceFits:
    """Has prices fitted every so many requests.

    Args:
        counts: what is counted.
        compute: runs a fit, given as a function without arguments, now or on another thread.
        on_fit: gets the counts that a fit was made from, where the fit runs.

    Attributes:
        prices: the prices that count.
    """

    def __init__(
        self,
        counts: ReturnCounts,
        compute: Callable[[Callable[[], None]], object],
        on_fit: Callable[[Counted], None],
    ) -> None:
        self.prices = Prices((), RECENCY)
        self._counts = counts
        self._compute = compute
        self._on_fit = on_fit
        self._requests = 0
        self._next_fit = _FIRST_FIT
        self._fitted: Prices | None = None

    def is_due(self) -> bool:
        """Whether the next request that is over begins a fit."""
        return self._requests + 1 >= self._next_fit

    def count_request(self) -> bool:
        """Note that a request is over; return whether other prices count from now on."""
        self._requests += 1
        if self._requests >= self._next_fit:
            self.fit()
        if self._fitted is None:
            return False
        self.prices, self._fitted = self._fitted, None
        return True

    def fit(self) -> None:
        """Begin a fit."""
        self._next_fit = self._requests + max(_FIRST_FIT, min(_FIT_EVERY, self._requests // 4))
        counted = self._counts.counted()
        self._counts.fade(_FADE)
        self._compute(lambda: self._fit_to(counted))

    def _fit_to(self, counted: Counted) -> None:
        # May run on another thread: the scheduler's takes the result over with its next request.
        self._fitted = fit_prices(counted)
        self._on_fit(counted)
