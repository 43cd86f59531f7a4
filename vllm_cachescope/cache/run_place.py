"""A place: the resident runs of one organisation, with a claim to be kept longer or without."""

from collections import deque
from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush

from vllm_cachescope.cache.return_prices import Prices
from vllm_cachescope.cache.runs import Run


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
        listed: by whether the organisation is spared, the price that the order has for the place.
    """

    __slots__ = ("_heap", "_prices", "cells", "due", "is_long", "listed", "org")

    def __init__(self, org: bytes, is_long: bool) -> None:
        self.org = org
        self.is_long = is_long
        self.cells: dict[int, deque[Run]] = {}
        self.due: dict[int, float] = {}
        self.listed: list[float | None] = [None, None]
        self._heap: list[tuple[float, int]] = []
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
                heappush(self._heap, (prices.of(run.cell), run.cell))
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

    def cheapest(self, prices: Prices) -> float | None:
        """Return the price of the block to go first; None if there is none."""
        self._price(prices)
        while self._heap:
            price, cell = self._heap[0]
            if self.oldest(cell) is not None:
                return price
            heappop(self._heap)
        return None

    def candidates(
        self, prices: Prices, may_go: Callable[[bytes, Run], bool]
    ) -> Iterator[tuple[float, bytes]]:
        """Yield ``(price, key)`` of the blocks that may go, cheapest first; of a run the end first.

        Nothing may change meanwhile.
        """
        self._price(prices)
        heap, seen = self._heap.copy(), set[int]()
        while heap:
            price, cell = heappop(heap)
            if cell in seen:
                continue
            seen.add(cell)
            for run in self.cells.get(cell, ()):
                if run.cell == cell and run.place is self:
                    for key in reversed(run.keys):
                        if may_go(key, run):
                            yield price, key

    def _price(self, prices: Prices) -> None:
        if self._prices is not prices:
            self._prices = prices
            self._heap = [(prices.of(cell), cell) for cell in self.cells]
            heapify(self._heap)
