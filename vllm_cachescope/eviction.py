"""Which block to give up when a tier is full."""

from collections import OrderedDict
from collections.abc import Callable


class LifetimeShare:
    """Evicts the block that has spent the largest share of its lifetime since its last use.

    Recency, weighted by TTL class: a block marked ``1h`` is given up after 12 minutes of idling
    where one marked ``5m`` goes after one minute. With a single TTL class this is LRU. Each class
    keeps its blocks in order of last use, so only the heads of the classes are compared.
    """

    def __init__(self) -> None:
        self._by_ttl: dict[int, OrderedDict[bytes, float]] = {}
        self._ttl: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._ttl)

    def use(self, key: bytes, ttl_s: int, now: float) -> None:
        """Add ``key``, or note that it was used at ``now`` (seconds, never running backwards)."""
        self.remove(key)
        self._ttl[key] = ttl_s
        self._by_ttl.setdefault(ttl_s, OrderedDict())[key] = now

    def remove(self, key: bytes) -> None:
        """Forget ``key``; one that is not known is ignored."""
        ttl_s = self._ttl.pop(key, None)
        if ttl_s is not None:
            del self._by_ttl[ttl_s][key]

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
        queues = {ttl_s: iter(queue.items()) for ttl_s, queue in self._by_ttl.items() if queue}
        heads: dict[int, tuple[bytes, float]] = {}

        def advance(ttl_s: int) -> None:
            for key, used_at in queues[ttl_s]:
                if not spare(key):
                    heads[ttl_s] = (key, used_at)
                    return
            heads.pop(ttl_s, None)

        for ttl_s in queues:
            advance(ttl_s)
        chosen: list[bytes] = []
        while len(chosen) < count:
            if not heads:
                return None
            ttl_s = max(heads, key=lambda ttl: (now - heads[ttl][1]) / ttl)
            chosen.append(heads[ttl_s][0])
            advance(ttl_s)
        return chosen

    def clear(self) -> None:
        """Forget everything."""
        self._by_ttl.clear()
        self._ttl.clear()
