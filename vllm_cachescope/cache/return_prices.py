"""Return prices: what it is worth to keep a block, by the kind and age of its run."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_cachescope.cache.return_counts import BINS, EDGES, WIDTHS, Counted

_PRIOR = 4.0
"""Runs' worth of belief in what the next coarser look says: the whole group for a level, all levels
together for a kind. With 4 returns expected and 8 seen the hazard is raised by half."""

_COARSE = 4
"""A level has an effect of its own on so many bins at once."""

_SWEEPS = 3

_FASTEST = 1e3
"""The highest hazard, in returns a second. Where a clock stands still there are returns in no time:
their hazard would be endless, and their price no number."""

Floats = NDArray[np.float64]

RECENCY: tuple[float, ...] = tuple(
    1.0 / (edge + width) for edge, width in zip(EDGES, WIDTHS, strict=True)
)
"""Prices while nothing is known: the longer unused, the less. This is LRU, by bins."""


@dataclass(frozen=True, slots=True)
class Prices:
    """The price of each cell: hits a second for each block that is kept.

    Attributes:
        cells: by kind number times `BINS` plus bin.
        other: by bin, for kinds that were not there yet.
    """

    cells: Sequence[float]
    other: Sequence[float]

    def of(self, cell: int) -> float:
        """Return the price of a cell; of `OVER` one that is lower than all others."""
        if cell < 0:
            return -1.0
        return self.cells[cell] if cell < len(self.cells) else self.other[cell % BINS]


def fit_prices(counted: Counted) -> Prices:
    """Return the prices that follow from what was counted.

    First the hazard of each kind and age, from coarse to fine, each step only as far from the one
    before as the counts bear out: the hazard of the kind's group; times the effects of the levels
    of its features, on the whole and by age; times what is the kind's own. Then the price: of all
    times to wait for the return, the one with the best chance of it for each second that the block
    would hold its place (Gittins' index).

    It takes some milliseconds, with `MAX_KINDS` kinds some hundred.
    """
    if not counted.kinds or not counted.returns.any():
        return Prices((), RECENCY)
    hazards = np.empty_like(counted.returns)
    groups = np.array([kind[0] for kind in counted.kinds])
    for group in np.unique(groups):
        rows = np.flatnonzero(groups == group)
        levels = np.array([counted.kinds[row][1:] for row in rows], dtype=np.int64)
        hazards[rows] = _hazards(levels, counted.returns[rows], counted.exposure[rows])
    rates = _best_rates(hazards)
    # Of what a request has stored that still runs nothing is known yet; it counts as the best.
    unknown = [number for number, kind in enumerate(counted.kinds) if set(kind[1:]) == {-1}]
    rates[unknown] = rates.max(0)
    pooled = _pooled(counted.returns, counted.exposure)[None]
    # An array: thousands of numbers more in a list would have to be freed one by one.
    other = _best_rates(np.minimum(pooled, _FASTEST))[0]
    return Prices(array("d", rates.tobytes()), other.tolist())


def _pooled(returns: Floats, exposure: Floats) -> Floats:
    """Return one hazard for each bin, drawn a little towards the same chance in every bin."""
    widths = np.array(WIDTHS)
    seen, at_risk = returns.sum(0), exposure.sum(0)
    chance = (seen.sum() + 0.1) / ((at_risk / widths).sum() + 1.0)
    pooled: Floats = (seen + 1.0) / (at_risk + widths / chance)
    return pooled


def _hazards(levels: NDArray[np.int64], returns: Floats, exposure: Floats) -> Floats:
    """Return the hazards of the kinds of one group; arrays of shape ``(kinds, BINS)``."""
    hazards = np.tile(_pooled(returns, exposure), (len(returns), 1))
    coarse = np.arange(BINS) // _COARSE
    to_coarse = np.zeros((BINS, coarse[-1] + 1))
    to_coarse[np.arange(BINS), coarse] = 1.0
    of_level = [np.unique(column, return_inverse=True)[1] for column in levels.T]
    for _ in range(_SWEEPS if len(returns) > 1 else 0):
        for numbers in of_level:
            shape = (numbers.max() + 1, BINS)
            seen, expected = np.zeros(shape), np.zeros(shape)
            np.add.at(seen, numbers, returns)
            np.add.at(expected, numbers, hazards * exposure)
            overall = (seen.sum(1) + _PRIOR) / (expected.sum(1) + _PRIOR)
            by_age = (seen @ to_coarse + 2 * _PRIOR * overall[:, None]) / (
                expected @ to_coarse + 2 * _PRIOR
            )
            hazards *= by_age[:, coarse][numbers]
            np.minimum(hazards, _FASTEST, out=hazards)
    own = (returns.sum(1) + _PRIOR) / ((hazards * exposure).sum(1) + _PRIOR)
    hazards *= own[:, None]
    hazards *= (returns + 2 * _PRIOR) / (hazards * exposure + 2 * _PRIOR)
    return np.minimum(hazards, _FASTEST, out=hazards)


def _best_rates(hazards: Floats) -> Floats:
    """Return the index of each kind and age: the most, over horizons, of the chance of a return
    until then over the time that is held until then or the return."""
    expected = hazards * np.array(WIDTHS)
    stays = np.exp(-expected)
    held = np.where(expected > 1e-9, (1.0 - stays) / np.maximum(hazards, 1e-300), WIDTHS)
    best = np.empty_like(hazards)
    # From the last bin back: `chance[:, h]` and `time[:, h]` are of the horizon that ends with h.
    chance, time = np.zeros_like(hazards), np.zeros_like(hazards)
    for begin in range(BINS - 1, -1, -1):
        stay = stays[:, begin, None]
        chance[:, begin:] = (1.0 - stay) + stay * chance[:, begin:]
        time[:, begin:] = held[:, begin, None] + stay * time[:, begin:]
        best[:, begin] = (chance[:, begin:] / time[:, begin:]).max(1)
    return best
