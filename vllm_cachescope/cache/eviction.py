"""The order of eviction: which blocks are evicted first when a tier is full."""

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from heapq import heapify, heappop, heappush, heapreplace

Place = tuple[int, bytes]
"""Names a queue of blocks: their TTL in seconds, and the tag of their organisation."""

Head = tuple[bytes, float]
"""The block at the head of a queue: its key, and when it was last used, in seconds."""


class LifetimeShare:
    """Evicts the block that has spent the largest share of its lifetime since its last use.

    This is recency, weighted by TTL class: a block with a TTL of 1 hour that has idled for 12
    minutes ranks like one with a TTL of 5 minutes that has idled for one minute. With a single TTL
    class it is LRU.

    An organisation that holds no more blocks than its reserve is spared: its blocks are evicted
    only when there are no others.

    Each pair of TTL class and organisation has a queue of its blocks in order of last use. Each
    class has a heap of its organisations, by the heads of their queues, so that only one block a
    class is compared. A block costs O(log organisations).

    Args:
        reserve: returns how many blocks of an organisation are spared, by its tag.
    """

    def __init__(self, reserve: Callable[[bytes], int] = lambda org: 0) -> None:
        self._reserve = reserve
        self._queues: dict[Place, OrderedDict[bytes, float]] = {}
        self._places: dict[bytes, Place] = {}
        self._held: Counter[bytes] = Counter()
        # By (is spared, TTL): a heap of (time, organisation), where no block of that queue was
        # used before that time. The heads of queues only grow younger, so a heap's times may be
        # too early, and never too late.
        self._heaps: defaultdict[tuple[bool, int], list[tuple[float, bytes]]] = defaultdict(list)
        # The time of each queue that is in a heap. Heap items with other times are stale.
        self._listed: dict[tuple[bool, Place], float] = {}

    def __len__(self) -> int:
        return len(self._places)

    def held(self, org: bytes) -> int:
        """Return how many blocks of ``org`` there are."""
        return self._held[org]

    @property
    def accounts(self) -> Mapping[bytes, int]:
        """How many blocks each organisation has."""
        return self._held

    def use(self, key: bytes, ttl_s: int, now: float, org: bytes = b"") -> None:
        """Add ``key``, or note that it was used at ``now`` (seconds, never running backwards)."""
        place = ttl_s, org
        if self._places.get(key) == place:
            self._queues[place].move_to_end(key)
            self._queues[place][key] = now
            return
        self.remove(key)
        self._places[key] = place
        self._queues.setdefault(place, OrderedDict())[key] = now
        self._hold(org, 1)
        self.enlist(place)

    def remove(self, key: bytes) -> None:
        """Remove ``key``; one that is not known is ignored."""
        place = self._places.pop(key, None)
        if place is None:
            return
        del self._queues[place][key]
        if not self._queues[place]:
            del self._queues[place]
            for spared in (False, True):
                self._listed.pop((spared, place), None)
        self._hold(place[1], -1)

    def victims(
        self, count: int, now: float, must_stay: Callable[[bytes], bool]
    ) -> list[bytes] | None:
        """Return the keys to evict first, the most dispensable one first, without removing them.

        Args:
            count: how many.
            now: current time in seconds.
            must_stay: whether a key may not be evicted: it is in use, or belongs to the very
                request that needs the room.

        Returns:
            ``count`` keys; None if fewer may be evicted.
        """
        selection = _Selection(self, now, must_stay)
        chosen: list[bytes] = []
        for spared in (False, True):
            while len(chosen) < count and (key := selection.take(spared)) is not None:
                chosen.append(key)
        selection.end()
        return chosen if len(chosen) == count else None

    def victims_of(
        self, org: bytes, count: int, now: float, must_stay: Callable[[bytes], bool]
    ) -> list[bytes]:
        """Return up to ``count`` keys of ``org`` to evict first; see `victims`."""
        queues = {
            ttl_s: ((key, at) for key, at in self._queues[ttl_s, org].items() if not must_stay(key))
            for ttl_s in self.classes()
            if (ttl_s, org) in self._queues
        }
        heads = {ttl_s: head for ttl_s, queue in queues.items() if (head := next(queue, None))}
        chosen: list[bytes] = []
        while heads and len(chosen) < count:
            ttl_s = max(heads, key=lambda ttl: (now - heads[ttl][1]) / ttl)
            chosen.append(heads.pop(ttl_s)[0])
            if (head := next(queues[ttl_s], None)) is not None:
                heads[ttl_s] = head
        return chosen

    def clear(self) -> None:
        """Remove all keys."""
        for held in (self._queues, self._places, self._held, self._heaps, self._listed):
            held.clear()

    def is_spared(self, org: bytes, evicted: int = 0) -> bool:
        """Whether ``org`` holds no more than its reserve once ``evicted`` of its blocks are
        evicted."""
        return self._held[org] - evicted <= self._reserve(org)

    # What follows is for `_Selection`.

    def classes(self) -> Collection[int]:
        """Return every TTL there was, in seconds."""
        return {ttl_s for _, ttl_s in self._heaps}

    def queue(self, place: Place) -> Iterator[Head]:
        """Return an iterator over a queue, oldest use first."""
        return iter(self._queues.get(place, OrderedDict()).items())

    def first(self, spared: bool, ttl_s: int) -> tuple[float, bytes] | None:
        """Return the first item of a heap, ``(time, organisation)``; None if it is empty."""
        heap = self._heaps[spared, ttl_s]
        while heap and self._listed.get((spared, (ttl_s, heap[0][1]))) != heap[0][0]:
            heappop(heap)
        return heap[0] if heap else None

    def unlist(self, spared: bool, place: Place) -> None:
        """Remove the first item of a heap, which is that of the queue at ``place``."""
        heappop(self._heaps[spared, place[0]])
        del self._listed[spared, place]

    def relist(self, spared: bool, place: Place, used_at: float) -> None:
        """Give the first item of a heap, which is that of the queue at ``place``, a later time."""
        self._listed[spared, place] = used_at
        heapreplace(self._heaps[spared, place[0]], (used_at, place[1]))

    def enlist(self, place: Place) -> None:
        """Ensure that the queue at ``place``, if it has blocks, is in the heap where it belongs,
        at no later time than that of its head."""
        head = next(self.queue(place), None)
        if head is not None:
            self.push(self.is_spared(place[1]), place, head[1])

    def push(self, spared: bool, place: Place, used_at: float) -> None:
        """Ensure that the queue at ``place`` is in a heap, at ``used_at`` or earlier."""
        listed = self._listed.get((spared, place))
        if listed is not None and listed <= used_at:
            return
        self._listed[spared, place] = used_at
        heap = self._heaps[spared, place[0]]
        heappush(heap, (used_at, place[1]))
        if len(heap) > 2 * len(self._queues) + 16:
            # Most items are stale.
            heap[:] = [
                (at, org)
                for (kind, (ttl_s, org)), at in self._listed.items()
                if (kind, ttl_s) == (spared, place[0])
            ]
            heapify(heap)

    def _hold(self, org: bytes, blocks: int) -> None:
        was_spared = self.is_spared(org)
        self._held[org] += blocks
        if not self._held[org]:
            del self._held[org]
        elif self.is_spared(org) != was_spared:
            for ttl_s in self.classes():
                self.enlist((ttl_s, org))


class _Selection:
    """One choice of victims. A block that was chosen counts as evicted from there on.

    Args:
        order: the blocks to choose from. They must not change meanwhile.
        now: current time in seconds.
        must_stay: whether a key may not be chosen.
    """

    def __init__(
        self, order: LifetimeShare, now: float, must_stay: Callable[[bytes], bool]
    ) -> None:
        self._order = order
        self._now = now
        self._must_stay = must_stay
        self._queues: dict[Place, Iterator[Head]] = {}
        self._heads: dict[Place, Head | None] = {}
        self._chosen: Counter[bytes] = Counter()

    def take(self, spared: bool) -> bytes | None:
        """Choose the most dispensable block of the organisations that are spared, or of those
        that are not; None if there is none."""
        found = [place for ttl_s in self._order.classes() if (place := self._first(spared, ttl_s))]
        if not found:
            return None
        place = max(found, key=self._share)
        key, _ = self._head(place)  # type: ignore[misc]
        self._chosen[place[1]] += 1
        self._advance(place)
        return key

    def end(self) -> None:
        """Put every queue back into its place in the heaps: nothing has been evicted yet."""
        for place in self._heads:
            self._order.enlist(place)

    def _first(self, spared: bool, ttl_s: int) -> Place | None:
        """Return the queue with the oldest block that may be chosen."""
        while (listed := self._order.first(spared, ttl_s)) is not None:
            used_at, org = listed
            place = ttl_s, org
            head = self._head(place)
            if head is None:
                self._order.unlist(spared, place)
            elif self._order.is_spared(org, self._chosen[org]) != spared:
                self._order.unlist(spared, place)
                self._order.push(not spared, place, head[1])
            elif head[1] > used_at:
                self._order.relist(spared, place, head[1])
            else:
                return place
        return None

    def _share(self, place: Place) -> float:
        _, used_at = self._heads[place]  # type: ignore[misc]
        return (self._now - used_at) / place[0]

    def _head(self, place: Place) -> Head | None:
        if place not in self._heads:
            self._queues[place] = self._order.queue(place)
            self._advance(place)
        return self._heads[place]

    def _advance(self, place: Place) -> None:
        queue = self._queues[place]
        self._heads[place] = next((head for head in queue if not self._must_stay(head[0])), None)
