"""The listing of places by their lowest ranks, in which the next victim's place is found."""

from collections.abc import Mapping
from heapq import heappop, heappush

from vllm_cachescope.cache.run_place import Place, Rank


class PlaceListing:
    """Places that have blocks to evict: apart by whether their organisation is spared, and whether
    their blocks were marked to live longer.

    Args:
        places: all places there are, by organisation and by whether they are long.
    """

    def __init__(self, places: Mapping[tuple[bytes, bool], Place]) -> None:
        self._places = places
        # By (is spared, is long): a heap of (rank, number, place), where no block of the place
        # ranks lower, but for prices that changed meanwhile.
        self._heaps: dict[tuple[bool, bool], list[tuple[Rank, int, Place]]] = {
            (spared, is_long): [] for spared in (False, True) for is_long in (False, True)
        }
        self._number = 0

    def top(self, spared: bool, is_long: bool) -> tuple[Rank, Place] | None:
        """Return the lowest listed place and its rank; None if there is none."""
        heap = self._heaps[spared, is_long]
        while heap:
            rank, _, place = heap[0]
            if place.listed[spared] == rank:
                return rank, place
            heappop(heap)
        return None

    def second(self, spared: bool, is_long: bool) -> Rank | None:
        """Return a rank that no place but the first is listed below; None if there is no other."""
        heap = self._heaps[spared, is_long]
        return min((item[0] for item in heap[1:3]), default=None)

    def remove(self, spared: bool, place: Place) -> None:
        """Remove a place that is listed."""
        place.listed[spared] = None

    def add(self, spared: bool, place: Place, rank: Rank) -> None:
        """List a place at a rank, whatever it was listed at before."""
        if place.listed[spared] != rank:
            place.listed[spared] = rank
            self._number += 1
            heap = self._heaps[spared, place.is_long]
            heappush(heap, (rank, self._number, place))
            if len(heap) > 4 * len(self._places) + 64:
                heap[:] = sorted(
                    (listed, number, one)
                    for number, one in enumerate(self._places.values())
                    if one.is_long == place.is_long and (listed := one.listed[spared]) is not None
                )
