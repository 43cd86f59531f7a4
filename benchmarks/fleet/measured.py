"""What was measured of a row: one run or several, and the median of them."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.fleet.row import Row
from benchmarks.fleet.run import Run
from benchmarks.harness import Spread


@dataclass(frozen=True, slots=True)
class Measured:
    """A row with its runs.

    Attributes:
        row: the row.
        runs: at least one.
    """

    row: Row
    runs: tuple[Run, ...]

    def spread(self, of: Callable[[Run], float]) -> Spread:
        """Return median, smallest and largest of something over the runs."""
        return Spread.of([of(run) for run in self.runs])

    @property
    def shares(self) -> Spread:
        """Tokens read, of those in prompts."""
        return self.spread(lambda run: run.share)

    @property
    def p50_ms(self) -> float:
        """Median time to the first token over all calls, in milliseconds; median of the runs."""
        return self.spread(lambda run: 1000 * statistics.median(run.ttft_s)).median

    @property
    def p99_ms(self) -> float:
        """99th percentile of the time to the first token, in milliseconds; median of the runs."""
        return self.spread(lambda run: 1000 * _p99(run.ttft_s)).median

    @property
    def across(self) -> int | None:
        """Tokens that a tenant read of another one's, in all runs; None if none looked at it."""
        told = [run.across for run in self.runs if run.across is not None]
        return sum(told) if told else None

    @property
    def own(self) -> int | None:
        """Tokens that a tenant read of its own, in the run where that was least; None if none
        looked at it."""
        return min((run.own for run in self.runs if run.own is not None), default=None)


def _p99(values: tuple[float, ...]) -> float:
    if len(values) < 2:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[98]
