"""A place: the resident runs of one organisation, with a claim to be kept longer or without."""

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Generator, Iterator
from heapq import heapify, heappop, heappush, heapreplace
from operator import attrgetter

from vllm_cachescope.cache.return_prices import Prices
from vllm_cachescope.cache.runs import Run

Rank = tuple[float, float]
"""The price of a block, and when its run was last used: the lowest goes first."""

_LOOK = 32
"""So many blocks of a run are looked at together."""


class Place:
    """Runs by kind and age, cheapest first.

    Runs of one kind and bin of ages are a cell; all cost the same, and the one unused for longest
    goes first. So only cells are compared, of which there are few: a step costs O(log cells), and
    new prices O(cells).

    Attributes:
        org: the tag of the organisation.
        is_long: whether its blocks were marked to live longer.
        cells: the runs of each cell that has a rank, oldest first. Some may have left it.
        listed: by whether the organisation is spared, what the order has for the place: its lowest
            rank, or a lower one.
    """

    __slots__ = ("_heap", "_prices", "cells", "is_long", "listed", "org")

    def __init__(self, org: bytes, is_long: bool) -> None:
        self.org = org
        self.is_long = is_long
        self.cells: dict[int, deque[Run]] = {}
        self.listed: list[Rank | None] = [None, None]
        self._heap: list[tuple[float, float, int]] = []
        self._prices: Prices | None = None

    def add(self, run: Run) -> bool:
        """Add a run to its cell; return whether the cell is new."""
        run.place = self
        runs = self.cells.get(run.cell)
        if runs is not None:
            # A cell that was empty meanwhile keeps its rank: a lower one than it has now.
            runs.append(run)
            return False
        self.cells[run.cell] = deque((run,))
        return True

    def insert(self, run: Run) -> bool:
        """Add a run to its cell that was used before others there; return whether it is the first
        to go of them."""
        run.place = self
        runs = self.cells.setdefault(run.cell, deque())
        at = bisect_right(runs, run.used_at, key=attrgetter("used_at"))
        runs.insert(at, run)
        return at == 0

    def leave(self, cell: int) -> None:
        """Note that a run has left a cell."""
        runs = self.cells.get(cell)
        while runs and (runs[0].cell != cell or runs[0].place is not self):
            runs.popleft()

    def price(self, cell: int, rank: Rank, prices: Prices) -> None:
        """Note the rank of a cell that is new, by these prices."""
        if self._prices is prices:
            heappush(self._heap, (*rank, cell))

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
        self, prices: Prices, free: Callable[[Run, int, int], list[bytes]]
    ) -> Generator[tuple[Rank, list[bytes]], None, None]:
        """Yield ``(rank, keys)`` of the blocks that may go, lowest first; of a run the end first.

        To be closed in the end. Nothing may change meanwhile: what is passed over is taken out of
        the place's own heap and put back then, so that a look costs what it passes and not what
        there is.

        Args:
            prices: the prices that count.
            free: returns which keys of a run may go, from the second number back to the first, in
                that order.
        """
        self._price(prices)
        heap, passed = self._heap, list[tuple[float, float, int]]()
        rest: dict[int, Iterator[Run]] = {}
        ahead: list[tuple[float, float, int, Run]] = []
        try:
            while heap or ahead:
                if heap and (not ahead or heap[0] < ahead[0]):
                    price, used_at, cell = item = heappop(heap)
                    if cell in rest or (oldest := self.oldest(cell)) is None:
                        continue
                    run = oldest
                    if run.used_at > used_at:
                        heappush(heap, (price, run.used_at, cell))
                        continue
                    passed.append(item)
                    rest[cell] = iter(self.cells[cell])
                    next(rest[cell])
                else:
                    price, used_at, cell, run = heappop(ahead)
                end = len(run.keys)
                while end > 0:
                    start = max(0, end - _LOOK)
                    if found := free(run, start, end):
                        yield (price, used_at), found
                    end = start
                for run in rest[cell]:
                    if run.cell == cell and run.place is self:
                        heappush(ahead, (price, run.used_at, cell, run))
                        break
        finally:
            for item in passed:
                heappush(heap, item)

    def _price(self, prices: Prices) -> None:
        if self._prices is not prices:
            self._prices = prices
            self.cells = {cell: runs for cell, runs in self.cells.items() if runs}
            self._heap = [
                (prices.of(cell), runs[0].used_at, cell) for cell, runs in self.cells.items()
            ]
            heapify(self._heap)
