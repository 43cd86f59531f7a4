"""Which block to give up when a tier is full."""

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush, heapreplace

Place = tuple[int, bytes]
"""A queue of blocks: their lifetime in seconds, and the organisation they belong to."""

Head = tuple[bytes, float]
"""A block at the head of its queue: its key, and when it was last used."""


class LifetimeShare:
    """Evicts the block that has spent the largest share of its lifetime since its last use.

    Recency, weighted by TTL class: a block marked ``1h`` is given up after 12 minutes of idling
    where one marked ``5m`` goes after one minute. With a single TTL class this is LRU.

    An organisation that holds no more than its reserve is spared: its blocks go only when nothing
    else can.

    In each class an organisation's blocks are kept in order of last use, and the organisations in
    heaps by the first of theirs, so that only the heads of the classes are compared. A block costs
    O(log organisations).

    Args:
        reserve: how many blocks of an organisation are spared.
    """

    def __init__(self, reserve: Callable[[bytes], int] = lambda org: 0) -> None:
        self._reserve = reserve
        self._queues: dict[Place, OrderedDict[bytes, float]] = {}
        self._places: dict[bytes, Place] = {}
        self._held: Counter[bytes] = Counter()
        # By whether they are spared, and class: the organisations, each under a time that no block
        # of its queue was used before. Heads only grow younger, so the heaps may lag behind them.
        self._heaps: defaultdict[tuple[bool, int], list[tuple[float, bytes]]] = defaultdict(list)
        # The times that count; what else is in the heaps is left over.
        self._listed: dict[tuple[bool, Place], float] = {}

    def __len__(self) -> int:
        return len(self._places)

    def held(self, org: bytes) -> int:
        """Return how many blocks of ``org`` there are."""
        return self._held[org]

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
        """Forget ``key``; one that is not known is ignored."""
        place = self._places.pop(key, None)
        if place is None:
            return
        del self._queues[place][key]
        if not self._queues[place]:
            del self._queues[place]
            for spared in (False, True):
                self._listed.pop((spared, place), None)
        self._hold(place[1], -1)

    def victims(self, count: int, now: float, spare: Callable[[bytes], bool]) -> list[bytes] | None:
        """Return the ``count`` keys to evict first, most dispensable first, without removing them.

        Args:
            count: how many.
            now: current time in seconds.
            spare: tells of a key that must stay (in use, or part of the very request that needs
                the room).

        Returns:
            None if fewer than ``count`` keys may go.
        """
        selection = _Selection(self, now, spare)
        chosen: list[bytes] = []
        for spared in (False, True):
            while len(chosen) < count and (key := selection.take(spared)) is not None:
                chosen.append(key)
        selection.end()
        return chosen if len(chosen) == count else None

    def victims_of(
        self, org: bytes, count: int, now: float, spare: Callable[[bytes], bool]
    ) -> list[bytes]:
        """Return up to ``count`` keys of ``org`` to evict first; see `victims`."""
        queues = {
            ttl_s: ((key, at) for key, at in self._queues[ttl_s, org].items() if not spare(key))
            for ttl_s in self._classes()
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
        """Forget everything."""
        for held in (self._queues, self._places, self._held, self._heaps, self._listed):
            held.clear()

    # For `_Selection`.

    def is_spared(self, org: bytes, gone: int = 0) -> bool:
        """Whether ``org`` holds no more than its reserve, once ``gone`` of its blocks are gone."""
        return self._held[org] - gone <= self._reserve(org)

    def queue(self, place: Place) -> Iterator[Head]:
        """Return an iterator over a queue, oldest first."""
        return iter(self._queues.get(place, OrderedDict()).items())

    def first(self, spared: bool, ttl_s: int) -> tuple[float, bytes] | None:
        """Return the first organisation of a heap, with its time; None if there is none."""
        heap = self._heaps[spared, ttl_s]
        while heap and self._listed.get((spared, (ttl_s, heap[0][1]))) != heap[0][0]:
            heappop(heap)
        return heap[0] if heap else None

    def unlist(self, spared: bool, place: Place) -> None:
        """Take the first organisation out of a heap."""
        heappop(self._heaps[spared, place[0]])
        del self._listed[spared, place]

    def relist(self, spared: bool, place: Place, used_at: float) -> None:
        """Give the first organisation of a heap a later time."""
        self._listed[spared, place] = used_at
        heapreplace(self._heaps[spared, place[0]], (used_at, place[1]))

    def enlist(self, place: Place) -> None:
        """See to it that a queue is in the heap where it belongs, and not after its head."""
        head = next(self.queue(place), None)
        if head is not None:
            self.push(self.is_spared(place[1]), place, head[1])

    def push(self, spared: bool, place: Place, used_at: float) -> None:
        """Put a queue into a heap, unless it is there already, and early enough."""
        listed = self._listed.get((spared, place))
        if listed is not None and listed <= used_at:
            return
        self._listed[spared, place] = used_at
        heap = self._heaps[spared, place[0]]
        heappush(heap, (used_at, place[1]))
        if len(heap) > 2 * len(self._queues) + 16:
            heap[:] = [
                (at, org)
                for (kind, (ttl_s, org)), at in self._listed.items()
                if (kind, ttl_s) == (spared, place[0])
            ]
            heapify(heap)

    def _classes(self) -> set[int]:
        return {ttl_s for _, ttl_s in self._heaps}

    def _hold(self, org: bytes, blocks: int) -> None:
        was_spared = self.is_spared(org)
        self._held[org] += blocks
        if not self._held[org]:
            del self._held[org]
        elif self.is_spared(org) != was_spared:
            for ttl_s in self._classes():
                self.enlist((ttl_s, org))


class _Selection:
    """One choice of victims. Those it has taken count as gone, and what must stay is passed over.

    Args:
        order: what it chooses from. It must not change meanwhile.
        now: current time in seconds.
        spare: tells of a key that must stay.
    """

    def __init__(self, order: LifetimeShare, now: float, spare: Callable[[bytes], bool]) -> None:
        self._order = order
        self._now = now
        self._spare = spare
        self._queues: dict[Place, Iterator[Head]] = {}
        self._heads: dict[Place, Head | None] = {}
        self._taken: Counter[bytes] = Counter()

    def take(self, spared: bool) -> bytes | None:
        """Take the most dispensable block of the organisations that are spared, or are not; None
        if there is none."""
        found = [place for ttl_s in self._order._classes() if (place := self._first(spared, ttl_s))]
        if not found:
            return None
        place = max(found, key=self._share)
        key, _ = self._head(place)  # type: ignore[misc]
        self._taken[place[1]] += 1
        self._advance(place)
        return key

    def end(self) -> None:
        """Put back into its place what was passed over, and what may not go in the end."""
        for place in self._heads:
            self._order.enlist(place)

    def _first(self, spared: bool, ttl_s: int) -> Place | None:
        """Return the queue with the oldest block that may be taken."""
        while (listed := self._order.first(spared, ttl_s)) is not None:
            used_at, org = listed
            place = ttl_s, org
            head = self._head(place)
            if head is None:
                self._order.unlist(spared, place)
            elif self._order.is_spared(org, self._taken[org]) != spared:
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
        rest = self._queues[place]
        self._heads[place] = next((head for head in rest if not self._spare(head[0])), None)
