"""Gone runs: runs of which no block is left, remembered so that their return is seen."""

from array import array
from collections import OrderedDict
from collections.abc import Mapping
from math import inf

import numpy as np

from vllm_cachescope.cache.return_counts import BINS, ReturnCounts
from vllm_cachescope.cache.run_ages import LEAVES_AT, bin_behind
from vllm_cachescope.cache.runs import Run

MAX_GONE_RUNS = 65_536
"""So many runs are remembered; some 300 bytes each."""


class GoneRuns:
    """Remembers runs by their first block, those that went last, and counts the time in which they
    could have returned.

    Args:
        counts: counts the time that runs spend in bins.
    """

    def __init__(self, counts: ReturnCounts) -> None:
        self._counts = counts
        self._runs: OrderedDict[bytes, Run] = OrderedDict()
        # Each run has a row: of what it was when it went, all that counts as it ages.
        self._rows: dict[bytes, int] = {}
        self._free: list[int] = []
        self._cells, self._used_at, self._leaves = array("q"), array("d"), array("d")

    @property
    def runs(self) -> Mapping[bytes, Run]:
        """The runs, by their first block."""
        return self._runs

    def cell_of(self, key: bytes) -> int | None:
        """Return the cell of the run that begins with ``key``, as of the last `advance`; None if it
        is not remembered."""
        row = self._rows.get(key)
        return None if row is None else self._cells[row]

    def add(self, run: Run) -> None:
        """Remember a run whose last block went; another one of the same first block is
        forgotten."""
        key = run.first
        assert key is not None
        self._forget(key)
        self._runs[key] = run
        leaves = run.used_at + LEAVES_AT[run.cell % BINS]
        if self._free:
            row = self._free.pop()
            self._cells[row], self._used_at[row], self._leaves[row] = run.cell, run.used_at, leaves
        else:
            row = len(self._cells)
            self._cells.append(run.cell)
            self._used_at.append(run.used_at)
            self._leaves.append(leaves)
        self._rows[key] = row
        if len(self._runs) > MAX_GONE_RUNS:
            self._forget(next(iter(self._runs)))

    def take(self, run: Run, now: float) -> None:
        """Forget a run that was used again at ``now`` (seconds), and count its time until then; one
        that is not remembered is ignored."""
        if run.first is None or self._runs.get(run.first) is not run:
            return
        run.cell = self._cells[self._rows[run.first]]
        self._forget(run.first)
        later = run.cell + bin_behind(run.cell % BINS, run.used_at, now) - run.cell % BINS
        self._counts.add_stay(run.cell, later, 1)
        run.cell = later

    def advance(self, now: float) -> None:
        """Count the time until ``now`` in seconds, of all runs at once. Nothing depends on it but
        the counts: to be called before they are read. With `MAX_GONE_RUNS` it takes less than a
        millisecond, and some more if all of them are due."""
        if not self._rows:
            return
        leaves, cells = np.frombuffer(self._leaves), np.frombuffer(self._cells, np.int64)
        used_at, due = np.frombuffer(self._used_at), np.flatnonzero(leaves <= now)
        while due.size:
            steps = _STEPS[cells[due] % BINS]
            self._counts.add_stays(cells[due], steps)
            cells[due] += steps
            leaves[due] = used_at[due] + _LEAVES_AT[cells[due] % BINS]
            due = due[leaves[due] <= now]

    def _forget(self, key: bytes) -> None:
        if self._runs.pop(key, None) is not None:
            row = self._rows.pop(key)
            self._leaves[row] = inf
            self._free.append(row)


_LEAVES_AT = np.array(LEAVES_AT)
_STEPS = np.array([bin_behind(bin_, 0.0, LEAVES_AT[bin_]) - bin_ for bin_ in range(BINS - 1)] + [0])
