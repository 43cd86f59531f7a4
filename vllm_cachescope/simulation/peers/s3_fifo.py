"""S3-FIFO: a small queue that new keys must be used in to reach the main one (Yang et al., SOSP
2023)."""

from collections import OrderedDict

from vllm_cachescope.simulation.peers.base import Peer

_SMALL_SHARE = 0.1
_MOST_USES = 3


class S3Fifo(Peer):
    """Three queues: small, main, and the ghosts of what left the small one unused."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._small_size = max(1, int(capacity * _SMALL_SHARE))
        self._small: OrderedDict[bytes, int] = OrderedDict()
        self._main: OrderedDict[bytes, int] = OrderedDict()
        self._ghosts: OrderedDict[bytes, None] = OrderedDict()

    def __contains__(self, key: bytes) -> bool:
        return key in self._small or key in self._main

    def __len__(self) -> int:
        return len(self._small) + len(self._main)

    def access(self, key: bytes, now: float) -> None:
        for queue in (self._small, self._main):
            if key in queue:
                queue[key] = min(_MOST_USES, queue[key] + 1)
                return
        while len(self) >= self.capacity:
            self._evict()
        if key in self._ghosts:
            del self._ghosts[key]
            self._main[key] = 0
        else:
            self._small[key] = 0

    def _evict(self) -> None:
        if self._small and (len(self._small) >= self._small_size or not self._main):
            key, uses = self._small.popitem(last=False)
            if uses > 1:
                self._main[key] = 0
                return
            self._ghosts[key] = None
            if len(self._ghosts) > self.capacity:
                self._ghosts.popitem(last=False)
            return
        key, uses = self._main.popitem(last=False)
        if uses:
            self._main[key] = uses - 1
