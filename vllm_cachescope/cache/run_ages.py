"""Run ages: runs pass from bin to bin as they stay unused, and the time is counted."""

from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from math import inf
from operator import attrgetter

from vllm_cachescope.cache.return_counts import BINS, EDGES, ReturnCounts
from vllm_cachescope.cache.return_prices import Prices
from vllm_cachescope.cache.run_place import Place, Rank
from vllm_cachescope.cache.runs import Run

_YOUNG = 3
"""Runs leave the first bin for this one, of 2.25 s: what is younger goes by the price of what has
just been used, and need not be moved twice meanwhile."""

_NEXT = tuple(max(bin_ + 1, _YOUNG) for bin_ in range(BINS))
"""The bin behind each; the last has none."""

LEAVES_AT = tuple(EDGES[_NEXT[bin_]] if bin_ < BINS - 1 else inf for bin_ in range(BINS))
"""The age in seconds at which a run leaves a bin."""

_LEFT = (0, *range(_YOUNG, BINS - 1))
"""The bins that runs leave, from the youngest on."""


def bin_behind(bin_: int, used_at: float, now: float) -> int:
    """Return the bin that a run has reached at ``now`` which was used at ``used_at`` (seconds), if
    it was in ``bin_`` before."""
    while used_at + LEAVES_AT[bin_] <= now:
        bin_ = _NEXT[bin_]
    return bin_


class RunAges:
    """Moves resident runs to the bins of their ages.

    Whatever their kinds, the runs of a bin leave it in the order in which they were used: a step
    costs O(1) for each run that it moves, and O(`BINS`) beyond that.

    Args:
        counts: counts the time that runs spend in bins.
        lower: is told where a cell is new, and its rank.
    """

    def __init__(self, counts: ReturnCounts, lower: Callable[[Place, Rank], None]) -> None:
        self._counts = counts
        self._lower = lower
        # By bin, the run used first in front. Some have left the bin, or have no blocks any more.
        self._queues: tuple[deque[Run], ...] = tuple(deque() for _ in range(BINS))
        # By bin, when the first of its runs leaves it, or some time before.
        self._due = [inf] * BINS
        self._next = inf

    def begin(self, run: Run) -> None:
        """Begin with a run that has just been used."""
        self._queues[0].append(run)
        at = run.used_at + LEAVES_AT[0]
        if at < self._due[0]:
            self._due[0] = at
            if at < self._next:
                self._next = at

    def join(self, run: Run) -> None:
        """Begin with a run that was used a while ago, and is in the bin of its age."""
        bin_ = run.cell % BINS
        if bin_ == BINS - 1:
            return
        queue = self._queues[bin_]
        queue.insert(bisect_right(queue, run.used_at, key=attrgetter("used_at")), run)
        self._due[bin_] = min(self._due[bin_], run.used_at + LEAVES_AT[bin_])
        self._next = min(self._next, self._due[bin_])

    def advance(self, now: float, prices: Prices) -> None:
        """Move the runs whose time it is, by these prices. Each run moves at most `BINS` times
        between two uses."""
        if now < self._next:
            return
        due = self._due
        for bin_ in _LEFT:
            if due[bin_] <= now:
                self._leave(bin_, now, prices)
        self._next = min(due)

    def _leave(self, bin_: int, now: float, prices: Prices) -> None:
        """Move the runs whose time it is to leave a bin."""
        lower, stay, queue, following = self._lower, self._counts.add_stay, self._queues[bin_], inf
        leaves_at, later = LEAVES_AT[bin_], _NEXT[bin_]
        # No run leaves the last bin.
        step, moved = later - bin_, self._queues[later] if later < BINS - 1 else None
        while queue:
            run = queue[0]
            cell, place = run.cell, run.place
            if place is not None and cell % BINS == bin_:
                if (at := run.used_at + leaves_at) > now:
                    following = at
                    break
                run.cell = cell + step
                if not run.is_open:
                    stay(cell, cell + step, 1)
                if moved is not None:
                    moved.append(run)
                if (rank := place.move(run, cell, prices)) is not None:
                    lower(place, rank)
            queue.popleft()
        self._due[bin_] = following
        if moved and self._due[later] > now:
            self._due[later] = min(self._due[later], moved[0].used_at + LEAVES_AT[later])
