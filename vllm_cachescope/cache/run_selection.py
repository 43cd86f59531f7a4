"""A selection of victims among runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from heapq import merge
from typing import TYPE_CHECKING

from vllm_cachescope.cache.run_place import Place, Rank
from vllm_cachescope.cache.runs import Run

if TYPE_CHECKING:
    from vllm_cachescope.cache.learned_order import LearnedOrder


class RunSelection:
    """One choice of victims. A block that was chosen counts as evicted from there on.

    Args:
        order: the blocks to choose from. They must not change meanwhile.
        must_stay: whether a key may not be chosen.
    """

    def __init__(self, order: LearnedOrder, must_stay: Callable[[bytes], bool]) -> None:
        self._order = order
        self._runs = order.runs
        self._must_stay = must_stay
        self._chosen: dict[bytes, None] = {}
        self._evicted: Counter[bytes] = Counter()
        self._long_left = order.long_held
        self._candidates: dict[Place, Iterator[tuple[Rank, bytes]]] = {}
        self._heads: dict[Place, tuple[Rank, bytes] | None] = {}

    def take(self, count: int) -> list[bytes]:
        """Choose up to ``count`` blocks, the most dispensable one first."""
        for spared in (False, True):
            while len(self._chosen) < count and (place := self._next(spared)) is not None:
                self._choose(place, count - len(self._chosen), spared)
        for place in self._heads:
            self._order.enlist(place)
        return list(self._chosen)

    def take_of(self, org: bytes, count: int) -> list[bytes]:
        """Choose up to ``count`` blocks of one organisation."""
        places = [self._order.place_of(org, is_long) for is_long in (False, True)]
        found = [place.candidates(self._order.prices, self._may_go) for place in places if place]
        for _, key in merge(*found):
            if len(self._chosen) >= count:
                break
            self._chosen[key] = None
        return list(self._chosen)

    def _choose(self, place: Place, most: int, spared: bool) -> None:
        """Choose blocks of one rank: where one of them goes first, so do the others, until their
        organisation is spared, or what is marked to live longer is back within its share."""
        order, org = self._order, place.org
        if not spared:
            most = min(most, order.exposed(org) - self._evicted[org])
        if place.is_long and self._long_left > order.long_blocks:
            most = min(most, self._long_left - order.long_blocks)
        head = self._heads[place]
        rank = head[0]  # type: ignore[index]
        candidates, taken = self._candidates[place], 0
        while head is not None and head[0] == rank and taken < most:
            self._chosen[head[1]] = None
            taken += 1
            head = next(candidates, None)
        self._heads[place] = head
        self._evicted[org] += taken
        self._long_left -= taken * place.is_long

    def _next(self, spared: bool) -> Place | None:
        """Return the place whose lowest block goes next."""
        short = self._first(spared, False)
        if short is not None and self._long_left <= self._order.long_blocks:
            return short
        long = self._first(spared, True)
        if short is None or long is None:
            return long if short is None else short
        return min(short, long, key=lambda place: self._heads[place][0])  # type: ignore[index]

    def _first(self, spared: bool, is_long: bool) -> Place | None:
        order = self._order
        while (listed := order.listing.top(spared, is_long)) is not None:
            rank, place = listed
            head = self._head(place)
            if head is None:
                order.listing.remove(spared, place)
            elif order.is_spared(place.org, self._evicted[place.org]) != spared:
                order.listing.remove(spared, place)
                order.listing.add(not spared, place, head[0])
            elif head[0] != rank:
                order.listing.add(spared, place, head[0])
                if head[0] <= rank:
                    return place
            else:
                return place
        return None

    def _head(self, place: Place) -> tuple[Rank, bytes] | None:
        if place not in self._heads:
            self._candidates[place] = place.candidates(self._order.prices, self._may_go)
            self._heads[place] = next(self._candidates[place], None)
        return self._heads[place]

    def _may_go(self, key: bytes, run: Run) -> bool:
        return self._runs.get(key) is run and key not in self._chosen and not self._must_stay(key)
