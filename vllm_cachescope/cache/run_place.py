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

    def add(self, run: Run, prices: Prices) -> Rank | None:
        """Add a run to its cell; return the rank of the cell by these prices if it is new."""
        run.place, cell = self, run.cell
        runs = self.cells.get(cell)
        if runs is not None:
            # A cell that was empty meanwhile keeps its rank: a lower one than it has now.
            runs.append(run)
            return None
        self.cells[cell] = deque((run,))
        return self._ranked(run, prices)

    def insert(self, run: Run, prices: Prices) -> Rank | None:
        """Add a run to its cell that was used before others there; return the rank that the cell
        has by these prices if it is the first of them to go."""
        run.place = self
        runs = self.cells.setdefault(run.cell, deque())
        at = bisect_right(runs, run.used_at, key=attrgetter("used_at"))
        runs.insert(at, run)
        return None if at else self._ranked(run, prices)

    def _ranked(self, run: Run, prices: Prices) -> Rank:
        """Note the rank of a cell by the first of its runs; return it."""
        price, used_at, cell = prices.of(run.cell), run.used_at, run.cell
        if self._prices is prices:
            heappush(self._heap, (price, used_at, cell))
        return price, used_at

    def move(self, run: Run, before: int, prices: Prices) -> Rank | None:
        """Put a run that was in the cell ``before`` into the one that it has now; return the rank
        of that by these prices if it is new."""
        cells, cell = self.cells, run.cell
        left = cells.get(before)
        while left and (left[0].cell != before or left[0].place is not self):
            left.popleft()
        runs = cells.get(cell)
        if runs is not None:
            runs.append(run)
            return None
        return self.add(run, prices)

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
        looked_at: set[Run] = set()  # One that left a cell and came back stands there twice.
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
                looked_at.add(run)
                end = len(run.keys)
                while end > 0:
                    start = end - _LOOK if end > _LOOK else 0
                    if found := free(run, start, end):
                        yield (price, used_at), found
                    end = start
                for run in rest[cell]:
                    if run.cell == cell and run.place is self and run not in looked_at:
                        heappush(ahead, (price, run.used_at, cell, run))
                        break
        finally:
            for item in passed:
                heappush(heap, item)

    def _price(self, prices: Prices) -> None:
        if self._prices is not prices:
            self._prices, price_of = prices, prices.of
            self.cells = cells = {cell: runs for cell, runs in self.cells.items() if runs}
            known, of_cell = len(prices.cells), prices.cells
            self._heap = [
                (of_cell[cell] if 0 <= cell < known else price_of(cell), runs[0].used_at, cell)
                for cell, runs in cells.items()
            ]
            heapify(self._heap)
