"""Return counts: how often runs of blocks were used again, by their kind and their age."""

from array import array
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

Kind = tuple[int, ...]
"""What is known of a run of blocks when it is used: its group, then a level of each feature."""

_FIRST_S, _GROWTH, _LAST_S = 1.0, 1.5, 86_400.0
_STEPS = int(np.ceil(np.log(_LAST_S / _FIRST_S) / np.log(_GROWTH)))

EDGES: tuple[float, ...] = (0.0, *(_FIRST_S * _GROWTH**step for step in range(_STEPS + 1)))
"""Where the bins of ages begin, in seconds: up to a second, then each half as long again as what
lies before it, up to a day and beyond. No trace has a say in them."""

BINS = len(EDGES)

WIDTHS: tuple[float, ...] = (
    *(after - before for before, after in pairwise(EDGES)),
    EDGES[-1],
)
"""How long a bin lasts, in seconds; the last one, which has no end, as long as all before it."""

_WIDTHS = np.array(WIDTHS)

OVER = -1
"""The cell of runs of which it is known that nobody will use them again: of no kind, and in the
last bin, which no run leaves."""

MAX_KINDS = 4096
"""What a hostile client can have counted: beyond so many kinds a run counts for its group."""


def bin_of(age_s: float) -> int:
    """Return the bin of an age in seconds."""
    return max(0, bisect_right(EDGES, age_s) - 1)


@dataclass(frozen=True, slots=True)
class Counted:
    """The counts at one moment, for `fit_prices`.

    Attributes:
        kinds: each kind, in the order of the rows below.
        returns: how many runs of a kind were used again at an age; shape ``(kinds, BINS)``.
        exposure: for how many seconds runs of a kind were of that age; the same shape.
    """

    kinds: tuple[Kind, ...]
    returns: NDArray[np.float64]
    exposure: NDArray[np.float64]

    def state(self) -> dict[str, Any]:
        """Return the counts as JSON-able data, for `ReturnCounts.restore`. No block, organisation
        or prompt can be told from it."""
        return {
            "edges": list(EDGES),
            "kinds": [list(kind) for kind in self.kinds],
            "returns": self.returns.ravel().round(4).tolist(),
            "exposure": self.exposure.ravel().round(3).tolist(),
        }


class ReturnCounts:
    """Counts returns and the time in which there could have been one. Each step takes O(1).

    The ratio of the two is a hazard: of the runs of one kind that are 40 seconds old, the share
    that is used again within the next second. Runs count whether their blocks are still there or
    not: what was evicted would otherwise look as if it never returned.
    """

    def __init__(self) -> None:
        self._numbers: dict[Kind, int] = {}
        self._kinds: list[Kind] = []
        self._returns = array("d")
        self._exposure = array("d")

    def number(self, kind: Kind) -> int:
        """Return the number of a kind; it gets one when it is first seen."""
        found = self._numbers.get(kind)
        if found is not None:
            return found
        if len(self._kinds) >= MAX_KINDS:
            kind = (kind[0],) + (-1,) * (len(kind) - 1)
            if kind in self._numbers:
                return self._numbers[kind]
        self._numbers[kind] = number = len(self._kinds)
        self._kinds.append(kind)
        self._returns.extend([0.0] * BINS)
        self._exposure.extend([0.0] * BINS)
        return number

    def kind(self, cell: int) -> Kind:
        """Return the kind of a cell: a kind's number times `BINS`, plus a bin."""
        return self._kinds[cell // BINS]

    def add_return(self, cell: int, age_s: float, part: float) -> None:
        """A run was used again.

        Args:
            cell: its kind's number times `BINS`, plus the bin up to which its time was counted.
            age_s: its age, in that bin or a later one.
            part: how much of it, from 0 to 1.
        """
        if cell == OVER:
            return
        bin_, exposure = cell % BINS, self._exposure
        while bin_ < BINS - 1 and EDGES[bin_ + 1] <= age_s:
            exposure[cell] += part * WIDTHS[bin_]
            bin_ += 1
            cell += 1
        self._returns[cell] += part
        exposure[cell] += part * (age_s - EDGES[bin_])

    def add_stay(self, cell: int, later: int, runs: int) -> None:
        """So many runs have passed through ``cell``, and those behind it, up to ``later``."""
        exposure, bin_ = self._exposure, cell % BINS
        while cell < later:
            exposure[cell] += runs * WIDTHS[bin_]
            cell += 1
            bin_ += 1

    def add_stays(self, cells: NDArray[np.int64], steps: NDArray[np.int64]) -> None:
        """A run has passed through each of ``cells``, and so many cells with it."""
        exposure = np.frombuffer(self._exposure)
        for passed in range(steps.max(initial=0)):
            through = cells[steps > passed] + passed
            np.add.at(exposure, through, _WIDTHS[through % BINS])

    def fade(self, factor: float) -> None:
        """Forget a part of all that was counted: what no longer holds loses its weight."""
        for counts in (self._returns, self._exposure):
            np.frombuffer(counts)[:] *= factor

    def counted(self) -> Counted:
        """Return a copy of the counts, which another thread may read."""
        shape = (len(self._kinds), BINS)
        return Counted(
            tuple(self._kinds),
            np.array(self._returns).reshape(shape),
            np.array(self._exposure).reshape(shape),
        )

    def restore(self, state: Any, lengths: Mapping[int, int]) -> bool:
        """Go on from what `Counted.state` returned, in another process.

        Args:
            state: that, or anything.
            lengths: how many numbers a kind of each group has.

        Returns:
            Whether it could be used. If not, as after an update with other bins or other features,
            nothing changes.
        """
        if not isinstance(state, Mapping) or state.get("edges") != list(EDGES):
            return False
        kinds, returns, exposure = (state.get(key) for key in ("kinds", "returns", "exposure"))
        if not (
            isinstance(kinds, list)
            and len(kinds) <= MAX_KINDS + 16
            and all(isinstance(kind, list) and kind for kind in kinds)
            and all(isinstance(level, int) for kind in kinds for level in kind)
            and all(lengths.get(kind[0]) == len(kind) for kind in kinds)
            and _are_counts(returns, len(kinds))
            and _are_counts(exposure, len(kinds))
        ):
            return False
        self._kinds = [tuple(kind) for kind in kinds]
        self._numbers = {kind: number for number, kind in enumerate(self._kinds)}
        self._returns = array("d", returns)
        self._exposure = array("d", exposure)
        return True


def _are_counts(values: Any, kinds: int) -> TypeGuard[list[float]]:
    return (
        isinstance(values, list)
        and len(values) == kinds * BINS
        and all(isinstance(value, int | float) and 0 <= value < 1e15 for value in values)
    )
