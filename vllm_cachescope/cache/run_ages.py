"""Run ages: runs pass from bin to bin as they stay unused, and the time is counted."""

from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush

from vllm_cachescope.cache.return_counts import BINS, EDGES, ReturnCounts
from vllm_cachescope.cache.run_place import Place
from vllm_cachescope.cache.runs import OPEN_KIND, Run

_YOUNG = 3
"""Runs leave the first bin for this one, of 2.25 s: what is younger goes by the price of what has
just been used, and need not be moved twice meanwhile."""

_NEXT = tuple(max(bin_ + 1, _YOUNG) for bin_ in range(BINS))
"""The bin behind each; the last has none."""

_LEAVES_AT = tuple(EDGES[_NEXT[bin_]] if bin_ < BINS - 1 else 0.0 for bin_ in range(BINS))


class RunAges:
    """Moves runs to the bins of their ages.

    Args:
        counts: counts the time that runs spend in bins.
        enter: is told of a cell that a place has got, and its first run.
    """

    def __init__(self, counts: ReturnCounts, enter: Callable[[Run, Place], None]) -> None:
        self._counts = counts
        self._enter = enter
        # A heap of (time, number, place, cell): no run of the cell need be moved before.
        self._due: list[tuple[float, int, Place, int]] = []
        self._number = 0

    def list(self, place: Place, cell: int, used_at: float) -> None:
        """List a cell for when its oldest run, used at ``used_at`` (seconds), leaves it."""
        bin_ = cell % BINS
        if bin_ == BINS - 1:
            return
        at = used_at + _LEAVES_AT[bin_]
        if place.due.get(cell, at) < at:
            return
        self._number += 1
        place.due[cell] = at
        heappush(self._due, (at, self._number, place, cell))

    def advance(self, now: float) -> None:
        """Move the runs whose time it is. Each run moves at most `BINS` times between two uses."""
        due = self._due
        while due and due[0][0] <= now:
            at, _, place, cell = heappop(due)
            if place.due.get(cell) != at:
                continue
            del place.due[cell]
            if (runs := place.cells.get(cell)) is None:
                continue
            bin_ = cell % BINS
            later = cell - bin_ + _NEXT[bin_]
            moved = _move(runs, place, cell, later, now)
            if runs:
                self.list(place, cell, runs[0].used_at)
            else:
                del place.cells[cell]
            if not moved:
                continue
            if self._counts.kind(cell) != OPEN_KIND:
                self._counts.add_stay(cell, later, len(moved))
            if (there := place.cells.get(later)) is not None:
                there.extend(moved)
            else:
                place.cells[later] = moved
                self._enter(moved[0], place)


def _move(runs: "deque[Run]", place: Place, cell: int, later: int, now: float) -> "deque[Run]":
    """Take those runs out of a cell whose time it is to leave it, and those that have left it
    already; return the former, which are in the cell ``later`` then."""
    leaves_at = _LEAVES_AT[cell % BINS]
    moved: deque[Run] = deque()
    while runs:
        run = runs[0]
        if run.cell == cell and run.place is place:
            # The very sum by which the cell is listed. With a difference, which may be rounded the
            # other way, a cell could be due for ever and no run of it move.
            if run.used_at + leaves_at > now:
                break
            run.cell = later
            moved.append(run)
        runs.popleft()
    return moved
