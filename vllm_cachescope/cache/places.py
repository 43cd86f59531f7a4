"""Places: where the blocks of all organisations are, and how many each of them holds."""

from collections import Counter
from collections.abc import Callable, Mapping

from vllm_cachescope.cache.place_listing import PlaceListing
from vllm_cachescope.cache.return_prices import Prices
from vllm_cachescope.cache.run_place import Place, Rank

_RELISTED = 8


class Places:
    """The places of each organisation, listed by their lowest ranks.

    Args:
        reserve: returns how many blocks of an organisation are spared, by its tag.

    Attributes:
        listing: the places that have blocks to evict.
        long_held: how many blocks were marked to live longer.
    """

    def __init__(self, reserve: Callable[[bytes], int]) -> None:
        self._reserve = reserve
        self._held: Counter[bytes] = Counter()
        self._places: dict[tuple[bytes, bool], Place] = {}
        self._stale: list[Place] = []
        self.listing = PlaceListing(self._places)
        self.long_held = 0

    @property
    def accounts(self) -> Mapping[bytes, int]:
        """How many blocks each organisation has."""
        return self._held

    def get(self, org: bytes, is_long: bool) -> Place | None:
        """Return a place; None if it has no blocks."""
        return self._places.get((org, is_long))

    def make(self, org: bytes, is_long: bool) -> Place:
        """Return a place, a new one if there is none."""
        place = self._places.get((org, is_long))
        if place is None:
            place = self._places[org, is_long] = Place(org, is_long)
        return place

    def hold(self, place: Place, blocks: int, prices: Prices) -> None:
        """Note that a place has so many more blocks, or less of them."""
        org = place.org
        before = self._held[org]
        held = self._held[org] = before + blocks
        if place.is_long:
            self.long_held += blocks
        if not held:
            del self._held[org]
            for is_long in (False, True):
                if (one := self._places.pop((org, is_long), None)) is not None:
                    one.listed = [None, None]
            return
        reserve = self._reserve(org)
        if (before <= reserve) != (held <= reserve):
            for is_long in (False, True):
                if (one := self._places.get((org, is_long))) is not None:
                    self.enlist(one, prices)

    def is_spared(self, org: bytes, evicted: int = 0) -> bool:
        """Whether ``org`` holds no more than its reserve once ``evicted`` of its blocks are
        evicted."""
        return self._held[org] - evicted <= self._reserve(org)

    def exposed(self, org: bytes) -> int:
        """Return how many blocks ``org`` holds beyond its reserve; 0 if it is spared."""
        return max(0, self._held[org] - self._reserve(org))

    def enlist(self, place: Place, prices: Prices) -> None:
        """List a place where it belongs, at its lowest rank, if it has any blocks."""
        rank = place.lowest(prices)
        if rank is not None:
            self.listing.add(self.is_spared(place.org), place, rank)

    def lower(self, place: Place, rank: Rank) -> None:
        """Note that a block of this rank came to a place."""
        spared = self._held[place.org] <= self._reserve(place.org)
        listed = place.listed[spared]
        if listed is None or rank < listed:
            self.listing.add(spared, place, rank)

    def note_new_prices(self) -> None:
        """Note that other prices count: all places are to be listed anew."""
        self._stale = list(self._places.values())

    def relist(self, prices: Prices) -> None:
        """List some places anew whose prices have changed: with ten thousand organisations all of
        them would keep the scheduler waiting."""
        for _ in range(min(_RELISTED, len(self._stale))):
            self.enlist(self._stale.pop(), prices)
