"""Price fits: when prices are made anew from what was counted, and taken over."""

from collections.abc import Callable

from vllm_cachescope.cache.return_counts import Counted, ReturnCounts
from vllm_cachescope.cache.return_prices import RECENCY, Prices, fit_prices

_FIRST_FIT, _FIT_EVERY = 16, 32
_KINDS_A_REQUEST = 5
"""A fit takes some 17 µs a kind: with many kinds it is made less often."""

_TOLD_EVERY = 256
"""Counts, which may be written to a file, are told after so many requests, at first sooner."""

_HALF_LIFE = 9_000
"""After so many requests half of what was counted before is left."""


class PriceFits:
    """Has prices fitted every so many requests.

    Args:
        counts: what is counted.
        compute: runs a fit, given as a function without arguments, now or on another thread.
        on_fit: gets the counts that a fit was made from, now and then, where the fit runs.

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
        self._requests = self._fitted_at = 0
        self._next_told = 0
        self._is_fitting = False
        self._next_fit = _FIRST_FIT
        self._fitted: Prices | None = None

    def is_due(self) -> bool:
        """Whether the next request that is over begins a fit."""
        return self._requests + 1 >= self._next_fit and not self._is_fitting

    def count_request(self) -> bool:
        """Note that a request is over; return whether other prices count from now on."""
        is_due = self.is_due()
        self._requests += 1
        if is_due:
            self.fit()
        if self._fitted is None:
            return False
        self.prices, self._fitted = self._fitted, None
        return True

    def fit(self) -> None:
        """Begin a fit."""
        counted, requests = self._counts.counted(), self._requests
        most = max(_FIT_EVERY, len(counted.kinds) // _KINDS_A_REQUEST)
        self._next_fit = requests + max(_FIRST_FIT, min(most, requests // 4))
        self._counts.fade(0.5 ** ((requests - self._fitted_at) / _HALF_LIFE))
        self._fitted_at, self._is_fitting = requests, True
        if tells := requests >= self._next_told:
            self._next_told = requests + min(_TOLD_EVERY, requests)
        self._compute(lambda: self._fit_to(counted, tells))

    def _fit_to(self, counted: Counted, tells: bool) -> None:
        # May run on another thread: the scheduler's takes the result over with its next request.
        try:
            self._fitted = fit_prices(counted)
        finally:
            self._is_fitting = False
        if tells:
            self._on_fit(counted)
