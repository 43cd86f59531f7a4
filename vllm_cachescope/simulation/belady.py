"""The offline optimum: keeps what is used again soonest."""

from collections.abc import Sequence
from heapq import heappop, heappush

from vllm_cachescope.simulation.simulated_cache import SimulatedCache
from vllm_cachescope.simulation.traced_request import TracedRequest

_NEVER = 2**62


class Belady(SimulatedCache):
    """Evicts the block whose next use is farthest, of several the one that is deepest in its
    prompt. It may leave out blocks of the very request that it stores.

    Args:
        capacity: how many blocks it holds.
        requests: all requests, in the order in which they will be stored.
    """

    def __init__(self, capacity: int, requests: Sequence[TracedRequest]) -> None:
        super().__init__(capacity)
        self._next: dict[bytes, int] = {}
        self._heap: list[tuple[int, int, bytes]] = []
        self._at = 0
        # Of each request, which request uses each of its blocks next.
        self._uses: list[list[int]] = []
        later: dict[bytes, int] = {}
        for number in range(len(requests) - 1, -1, -1):
            keys = requests[number].keys
            self._uses.append([later.get(key, _NEVER) for key in keys])
            later.update(dict.fromkeys(keys, number))
        self._uses.reverse()

    def __contains__(self, key: bytes) -> bool:
        return key in self._next

    def __len__(self) -> int:
        return len(self._next)

    def store(self, request: TracedRequest) -> None:
        uses = self._uses[self._at]
        self._at += 1
        for depth, (key, at) in enumerate(zip(request.keys, uses, strict=True)):
            self._next[key] = at
            heappush(self._heap, (-at, -depth, key))
        while len(self._next) > self.capacity:
            at, _, key = heappop(self._heap)
            if self._next.get(key) == -at:
                del self._next[key]
                self.evictions += 1
