"""A simulated cache: something that requests are replayed against."""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from itertools import islice

from vllm_cachescope.cache.eviction import LifetimeShare
from vllm_cachescope.cache.learned_order import LONG_TTL_S, LearnedOrder, Piece
from vllm_cachescope.simulation.peers.base import Peer
from vllm_cachescope.simulation.session_blocks import SessionBlocks
from vllm_cachescope.simulation.traced_request import TracedRequest


class SimulatedCache(ABC):
    """A cache of ``capacity`` blocks.

    Attributes:
        capacity: how many blocks it holds.
        evictions: how many blocks left it for want of room.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.evictions = 0

    @abstractmethod
    def __contains__(self, key: bytes) -> bool:
        """Whether a block is there."""

    @abstractmethod
    def __len__(self) -> int:
        """Return how many blocks are there."""

    @abstractmethod
    def store(self, request: TracedRequest) -> None:
        """Use and store the blocks of a request."""

    def expire(self, now: float) -> None:
        """Drop what may not be read any more at ``now`` (seconds)."""
        del now


class PeerCache(SimulatedCache):
    """A policy that knows keys alone. A prompt's blocks are used from the last to the first, so
    that a prefix loses its end first."""

    def __init__(self, peer: Peer) -> None:
        super().__init__(peer.capacity)
        self._peer = peer

    def __contains__(self, key: bytes) -> bool:
        return key in self._peer

    def __len__(self) -> int:
        return len(self._peer)

    def expire(self, now: float) -> None:
        self._peer.expire(now)

    def store(self, request: TracedRequest) -> None:
        before = len(self._peer)
        new = sum(key not in self._peer for key in request.keys)
        for key in reversed(request.keys):
            self._peer.access(key, request.at)
        self.evictions += before + new - len(self._peer)


class _Expiring(SimulatedCache):
    """A cache whose blocks have lifetimes: the longest TTL that one ever had counts."""

    _UNLIMITED = 300

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._ttl: dict[bytes, int | None] = {}
        self._by_ttl: dict[int, OrderedDict[bytes, float]] = {}

    def expire(self, now: float) -> None:
        for ttl_s, used_at in self._by_ttl.items():
            while used_at:
                key, at = next(iter(used_at.items()))
                if at + ttl_s > now:
                    break
                del used_at[key]
                self._drop(key)

    def _live(self, key: bytes, ttl_s: int | None, now: float) -> int:
        """Start or refresh a lifetime; return the TTL that counts."""
        known = self._ttl.get(key)
        longest = ttl_s if known is None else max(known, ttl_s or 0)
        if known is not None and known != longest:
            del self._by_ttl[known][key]
        self._ttl[key] = longest
        if longest is None:
            return self._UNLIMITED
        queue = self._by_ttl.setdefault(longest, OrderedDict())
        queue[key] = now
        queue.move_to_end(key)
        return longest

    def _evict(self, keys: list[bytes]) -> None:
        self.evictions += len(keys)
        for key in keys:
            if (ttl_s := self._ttl[key]) is not None:
                del self._by_ttl[ttl_s][key]
            self._drop(key)

    def _drop(self, key: bytes) -> None:
        del self._ttl[key]
        self._forget(key)

    @abstractmethod
    def _forget(self, key: bytes) -> None:
        """Remove a key from the order."""


class LearnedCache(_Expiring):
    """The production policy: `LearnedOrder`.

    Args:
        capacity: how many blocks it holds.
        long_share: the share of them that is kept for what is marked to live longer.
        make_order: makes the order.
    """

    def __init__(
        self,
        capacity: int,
        long_share: float,
        make_order: Callable[..., LearnedOrder] = LearnedOrder,
    ) -> None:
        super().__init__(capacity)
        self.order = make_order(long_blocks=int(capacity * long_share))
        self._sessions = SessionBlocks()

    def __contains__(self, key: bytes) -> bool:
        return key in self.order.runs

    def __len__(self) -> int:
        return len(self.order)

    def store(self, request: TracedRequest) -> None:
        self.order.use_request(self._pieces(request), request.at, request.signals)
        if request.session is not None:
            self._sessions.use(request.org, request.session, request.keys)
            if request.session_over:
                self.order.retire(self._sessions.end(request.org, request.session))
        over = len(self.order) - self.capacity
        if over > 0:
            self._evict(self.order.victims(over, request.at, _none_must_stay) or [])

    def _pieces(self, request: TracedRequest) -> list[Piece]:
        org = request.org.encode()
        if request.ttl_s is None and not self._by_ttl:
            for key in request.keys:
                self._ttl[key] = None
            return [(request.keys, self._UNLIMITED, org)]
        ttls = [self._live(key, request.ttl_s, request.at) for key in request.keys]
        pieces: list[Piece] = []
        start = 0
        for end in range(1, len(ttls) + 1):
            if end == len(ttls) or (ttls[end] > LONG_TTL_S) != (ttls[start] > LONG_TTL_S):
                pieces.append((request.keys[start:end], ttls[start], org))
                start = end
        return pieces

    def _forget(self, key: bytes) -> None:
        self.order.remove(key)
        self._sessions.forget(key)


class LifetimeCache(_Expiring):
    """The other policy of the CPU tier: `LifetimeShare`."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._order = LifetimeShare()

    def __contains__(self, key: bytes) -> bool:
        return key in self._ttl

    def __len__(self) -> int:
        return len(self._order)

    def store(self, request: TracedRequest) -> None:
        org = request.org.encode()
        for key in reversed(request.keys):
            ttl_s = self._live(key, request.ttl_s, request.at)
            self._order.use(key, ttl_s, request.at, org)
        over = len(self._order) - self.capacity
        if over > 0:
            self._evict(self._order.victims(over, request.at, _none_must_stay) or [])

    def _forget(self, key: bytes) -> None:
        self._order.remove(key)


class ExpiringLru(_Expiring):
    """LRU whose blocks live as their requests ask, as those of the CPU tier's own policies do."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._order: OrderedDict[bytes, None] = OrderedDict()

    def __contains__(self, key: bytes) -> bool:
        return key in self._order

    def __len__(self) -> int:
        return len(self._order)

    def store(self, request: TracedRequest) -> None:
        for key in reversed(request.keys):
            self._live(key, request.ttl_s, request.at)
            self._order[key] = None
            self._order.move_to_end(key)
        over = len(self._order) - self.capacity
        if over > 0:
            self._evict(list(islice(self._order, over)))

    def _forget(self, key: bytes) -> None:
        del self._order[key]


def _none_must_stay(key: bytes) -> bool:
    return False
