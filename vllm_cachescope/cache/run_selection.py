"""A selection of victims among runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator
from heapq import merge
from typing import TYPE_CHECKING

from vllm_cachescope.cache.run_place import Place, Rank
from vllm_cachescope.cache.runs import Run

if TYPE_CHECKING:
    from vllm_cachescope.cache.learned_order import LearnedOrder

Head = tuple[Rank, list[bytes]]
"""Blocks of one rank, the first to go first."""


class RunSelection:
    """One choice of victims. A block that was chosen counts as evicted from there on.

    Args:
        order: the blocks to choose from. They must not change meanwhile.
        must_stay: whether a key may not be chosen.
    """

    def __init__(self, order: LearnedOrder, must_stay: Callable[[bytes], bool]) -> None:
        self._places = order.places
        self._prices = order.prices
        self._long_blocks = order.long_blocks
        self._runs = order.runs
        self._must_stay = must_stay
        self._chosen: list[bytes] = []
        self._evicted: Counter[bytes] = Counter()
        self._long_left = order.places.long_held
        self._candidates: dict[Place, Generator[Head, None, None]] = {}
        self._heads: dict[Place, Head | None] = {}

    def take(self, count: int) -> list[bytes]:
        """Choose up to ``count`` blocks, the most dispensable one first."""
        for spared in (False, True):
            while (left := count - len(self._chosen)) > 0:
                if (place := self._next(spared)) is None:
                    break
                self._choose(place, left, spared)
        for candidates in self._candidates.values():
            candidates.close()
        for place in self._heads:
            self._places.enlist(place, self._prices)
        return self._chosen

    def take_of(self, org: bytes, count: int) -> list[bytes]:
        """Choose up to ``count`` blocks of one organisation."""
        places = [self._places.get(org, is_long) for is_long in (False, True)]
        found = [place.candidates(self._prices, self._free) for place in places if place]
        for _, keys in merge(*found):
            self._chosen += keys[: max(0, count - len(self._chosen))]
            if len(self._chosen) >= count:
                break
        for candidates in found:
            candidates.close()
        return self._chosen

    def _choose(self, place: Place, most: int, spared: bool) -> None:
        """Choose blocks of a place until another's may go before the next of them: what ranks as
        the lowest does goes with it, until its organisation is spared, or what is marked to live
        longer is back within its share."""
        places, org, chosen = self._places, place.org, self._chosen
        if not spared:
            most = min(most, places.exposed(org) - self._evicted[org])
        if place.is_long and self._long_left > self._long_blocks:
            most = min(most, self._long_left - self._long_blocks)
        head = self._heads[place]
        assert head is not None
        first, bound = head[0], self._bound(place, spared)
        candidates, left = self._candidates[place], most
        while head is not None and left > 0:
            rank, keys = head
            if rank != first and bound is not None and rank >= bound:
                break
            if len(keys) > left:
                chosen += keys[:left]
                head, left = (rank, keys[left:]), 0
            else:
                chosen += keys
                left -= len(keys)
                head = next(candidates, None)
        self._heads[place] = head
        self._evicted[org] += most - left
        self._long_left -= (most - left) * place.is_long

    def _bound(self, place: Place, spared: bool) -> Rank | None:
        """Return a rank that no block of another place is below which competes with this one; None
        if there is no other."""
        listing, is_long = self._places.listing, place.is_long
        bound = listing.second(spared, is_long)
        # Those marked to live longer compete with the others only beyond their share, or alone.
        if is_long or self._long_left > self._long_blocks:
            other = listing.top(spared, not is_long)
            if other is not None and (bound is None or other[0] < bound):
                bound = other[0]
        return bound

    def _next(self, spared: bool) -> Place | None:
        """Return the place whose lowest block goes next."""
        short = self._first(spared, False)
        if short is not None and self._long_left <= self._long_blocks:
            return short
        long = self._first(spared, True)
        if short is None or long is None:
            return long if short is None else short
        return min(short, long, key=lambda place: self._heads[place][0])  # type: ignore[index]

    def _first(self, spared: bool, is_long: bool) -> Place | None:
        places, listing = self._places, self._places.listing
        while (listed := listing.top(spared, is_long)) is not None:
            rank, place = listed
            head = self._head(place)
            if head is None:
                listing.remove(spared, place)
            elif places.is_spared(place.org, self._evicted[place.org]) != spared:
                listing.remove(spared, place)
                listing.add(not spared, place, head[0])
            elif head[0] != rank:
                listing.add(spared, place, head[0])
                if head[0] <= rank:
                    return place
            else:
                return place
        return None

    def _head(self, place: Place) -> Head | None:
        if place not in self._heads:
            self._candidates[place] = place.candidates(self._prices, self._free)
            self._heads[place] = next(self._candidates[place], None)
        return self._heads[place]

    def _free(self, run: Run, start: int, end: int) -> list[bytes]:
        keys, must_stay = run.keys[start:end], self._must_stay
        if run.live < len(run.keys):
            run_of = self._runs.get
            keys = [key for key in keys if run_of(key) is run]
        keys.reverse()
        return [key for key in keys if not must_stay(key)]
