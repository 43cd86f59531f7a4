"""A place: the resident runs of one organisation, with a claim to be kept longer or without."""

from collections import deque
from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush, heapreplace

from vllm_cachescope.cache.return_prices import Prices
from vllm_cachescope.cache.runs import Run

Rank = tuple[float, float]
"""The price of a block, and when its run was last used: the lowest goes first."""


class Place:
    """Runs by kind and age, cheapest first.

    Runs of one kind and bin of ages are a cell; all cost the same, and the one unused for longest
    goes first. So only cells are compared, of which there are few: a step costs O(log cells), and
    new prices O(cells).

    Attributes:
        org: the tag of the organisation.
        is_long: whether its blocks were marked to live longer.
        cells: the runs of each cell, oldest first. Some may have left it.
        due: when the oldest run of a cell reaches the next bin, in seconds, or earlier.
        listed: by whether the organisation is spared, what the order has for the place: its lowest
            rank, or a lower one.
    """

    __slots__ = ("_heap", "_prices", "cells", "due", "is_long", "listed", "org")

    def __init__(self, org: bytes, is_long: bool) -> None:
        self.org = org
        self.is_long = is_long
        self.cells: dict[int, deque[Run]] = {}
        self.due: dict[int, float] = {}
        self.listed: list[Rank | None] = [None, None]
        self._heap: list[tuple[float, float, int]] = []
        self._prices: Prices | None = None

    def add(self, run: Run, prices: Prices) -> bool:
        """Add a run to its cell; return whether the cell is new."""
        run.place = self
        runs = self.cells.get(run.cell)
        if runs is not None:
            runs.append(run)
            return False
        self.cells[run.cell] = deque((run,))
        if self._prices is prices:
            if len(self._heap) > 2 * len(self.cells) + 16:
                self._prices = None
            else:
                heappush(self._heap, (prices.of(run.cell), run.used_at, run.cell))
        return True

    def oldest(self, cell: int) -> Run | None:
        """Return the oldest run of a cell that is still there; None if there is none, and the cell
        is removed then."""
        runs = self.cells.get(cell)
        if runs is None:
            return None
        while runs:
            run = runs[0]
            if run.cell == cell and run.place is self:
                return run
            runs.popleft()
        del self.cells[cell]
        return None

    def age(self, cell: int, used_before: float) -> list[Run]:
        """Move the runs of a cell that were used at ``used_before`` (seconds) or earlier to the
        cell of the next bin; return them."""
        moved: list[Run] = []
        runs = self.cells.get(cell)
        while runs:
            run = runs[0]
            if run.cell == cell and run.place is self:
                if run.used_at > used_before:
                    return moved
                run.cell = cell + 1
                moved.append(run)
            runs.popleft()
        self.cells.pop(cell, None)
        return moved

    def lowest(self, prices: Prices) -> Rank | None:
        """Return the rank of the block to go first; None if there is none."""
        self._price(prices)
        while self._heap:
            price, used_at, cell = self._heap[0]
            run = self.oldest(cell)
            if run is None:
                heappop(self._heap)
            elif run.used_at > used_at:
                heapreplace(self._heap, (price, run.used_at, cell))
            else:
                return price, used_at
        return None

    def candidates(
        self, prices: Prices, may_go: Callable[[bytes, Run], bool]
    ) -> Iterator[tuple[Rank, bytes]]:
        """Yield ``(rank, key)`` of the blocks that may go, lowest first; of a run the end first.

        Nothing may change meanwhile.
        """
        self._price(prices)
        heap, cells = self._heap.copy(), dict[int, Iterator[Run]]()
        heads: dict[int, Run] = {}
        while heap:
            price, used_at, cell = heappop(heap)
            if cell not in cells:
                cells[cell] = iter(self.cells.get(cell, ()))
                self._advance(cell, cells[cell], heads)
            run = heads.get(cell)
            if run is None:
                continue
            if run.used_at > used_at:
                heappush(heap, (price, run.used_at, cell))
                continue
            for key in reversed(run.keys):
                if may_go(key, run):
                    yield (price, used_at), key
            self._advance(cell, cells[cell], heads)
            if cell in heads:
                heappush(heap, (price, heads[cell].used_at, cell))

    def _advance(self, cell: int, runs: Iterator[Run], heads: dict[int, Run]) -> None:
        heads.pop(cell, None)
        for run in runs:
            if run.cell == cell and run.place is self:
                heads[cell] = run
                return

    def _price(self, prices: Prices) -> None:
        if self._prices is not prices:
            self._prices = prices
            self._heap = [
                (prices.of(cell), runs[0].used_at, cell)
                for cell, runs in self.cells.items()
                if runs
            ]
            heapify(self._heap)
