"""LRU, by itself and with a lifetime."""

from collections import OrderedDict

from vllm_cachescope.simulation.peers.base import Peer


class Lru(Peer):
    """Evicts what was unused for longest."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._used_at: OrderedDict[bytes, float] = OrderedDict()

    def __contains__(self, key: bytes) -> bool:
        return key in self._used_at

    def __len__(self) -> int:
        return len(self._used_at)

    def access(self, key: bytes, now: float) -> None:
        self._used_at[key] = now
        self._used_at.move_to_end(key)
        if len(self._used_at) > self.capacity:
            self._used_at.popitem(last=False)


class LruTtl(Lru):
    """LRU that drops what was unused for five minutes."""

    TTL_S = 300.0

    def expire(self, now: float) -> None:
        while self._used_at:
            key, used_at = next(iter(self._used_at.items()))
            if used_at + self.TTL_S > now:
                return
            del self._used_at[key]
