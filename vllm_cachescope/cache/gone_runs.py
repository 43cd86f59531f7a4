"""Gone runs: runs of which no block is left, remembered so that their return is seen."""

from collections import OrderedDict
from collections.abc import Mapping
from heapq import heapify, heappop, heappush

from vllm_cachescope.cache.return_counts import BINS, ReturnCounts
from vllm_cachescope.cache.run_ages import LEAVES_AT, NEXT_BIN
from vllm_cachescope.cache.runs import Run

MAX_GONE_RUNS = 65_536
"""So many runs are remembered; some 300 bytes each."""


class GoneRuns:
    """Remembers runs by their first block, those that went last, and counts the time in which they
    could have returned. A step takes O(log n) amortised.

    Args:
        counts: counts the time that runs spend in bins.
    """

    def __init__(self, counts: ReturnCounts) -> None:
        self._counts = counts
        self._runs: OrderedDict[bytes, Run] = OrderedDict()
        # A heap of (time, number, run): the run reaches its next bin then, if it is still known.
        self._due: list[tuple[float, int, Run]] = []
        self._number = 0

    @property
    def runs(self) -> Mapping[bytes, Run]:
        """The runs, by their first block."""
        return self._runs

    def add(self, run: Run) -> None:
        """Remember a run whose last block went; another one of the same first block is
        forgotten."""
        assert run.first is not None
        self._runs.pop(run.first, None)
        self._runs[run.first] = run
        self._list(run)
        if len(self._runs) > MAX_GONE_RUNS:
            self._runs.popitem(last=False)
        if len(self._due) > 2 * len(self._runs) + 64:
            self._due = [item for item in self._due if self._knows(item[2])]
            heapify(self._due)

    def take(self, run: Run, now: float) -> None:
        """Forget a run that was used again at ``now`` (seconds), and count its time until then."""
        assert run.first is not None
        del self._runs[run.first]
        self._pass(run, now)

    def advance(self, now: float) -> None:
        """Count the time until ``now`` in seconds. Nothing depends on it but the counts: to be
        called before they are read, so that a run passes through many bins at once."""
        due = self._due
        while due and due[0][0] <= now:
            run = heappop(due)[2]
            if self._knows(run):
                self._pass(run, now)
                self._list(run)

    def _knows(self, run: Run) -> bool:
        return run.first is not None and self._runs.get(run.first) is run

    def _list(self, run: Run) -> None:
        bin_ = run.cell % BINS
        if bin_ < BINS - 1:
            self._number += 1
            heappush(self._due, (run.used_at + LEAVES_AT[bin_], self._number, run))

    def _pass(self, run: Run, now: float) -> None:
        bin_ = first = run.cell % BINS
        while bin_ < BINS - 1 and run.used_at + LEAVES_AT[bin_] <= now:
            bin_ = NEXT_BIN[bin_]
        later = run.cell + bin_ - first
        self._counts.add_stay(run.cell, later, 1)
        run.cell = later
