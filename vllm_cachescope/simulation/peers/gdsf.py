"""GDSF: by how often a key was used, and when (Cherkasova, HP Labs 1998)."""

from heapq import heappop, heappush

from vllm_cachescope.simulation.peers.base import Peer


class Gdsf(Peer):
    """Greedy-Dual-Size-Frequency. Blocks are of one size and cost, so that a key's priority is its
    uses, plus the priority of what was evicted last when it was used."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._floor = 0.0
        self._uses: dict[bytes, int] = {}
        self._priority: dict[bytes, float] = {}
        self._heap: list[tuple[float, int, bytes]] = []
        self._number = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self._uses

    def __len__(self) -> int:
        return len(self._uses)

    def access(self, key: bytes, now: float) -> None:
        if key not in self._uses and len(self._uses) >= self.capacity:
            self._evict()
        uses = self._uses[key] = self._uses.get(key, 0) + 1
        priority = self._priority[key] = self._floor + uses
        self._number += 1
        heappush(self._heap, (priority, self._number, key))

    def _evict(self) -> None:
        while True:
            priority, _, key = heappop(self._heap)
            if self._priority.get(key) == priority:
                self._floor = priority
                del self._priority[key], self._uses[key]
                return
