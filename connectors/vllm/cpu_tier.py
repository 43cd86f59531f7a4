"""The CPU tier: vLLM's own primary offloading tier, with our eviction policy and expiry."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

from vllm.v1.kv_offload.base import (
    LookupResult,
    OffloadingEvent,
    OffloadKey,
    PrepareStoreOutput,
    ReqContext,
)
from vllm.v1.kv_offload.cpu.policies.base import CachePolicy, ChunkStatus, order_request_keys
from vllm.v1.kv_offload.tiering.manager import (
    CPUPrimaryTierOffloadingManager,
    TieringOffloadingManager,
)

from vllm_cachescope.eviction import LifetimeShare
from vllm_cachescope.ledger import Ledger, Reason
from vllm_cachescope.owners import NOBODY

CPU = "cpu"


class ScopePolicy(CachePolicy):
    """Evicts by share of lifetime spent, with the lifetimes of the ledger it is bound to.

    vLLM makes it by name from the configuration, so `bind` comes after. Expired chunks never
    wait here for pressure: `CpuTier.discard` takes them out.
    """

    def __init__(self, cache_capacity: int) -> None:
        super().__init__(cache_capacity)
        self._chunks: dict[OffloadKey, ChunkStatus] = {}
        self._order = LifetimeShare()
        self._ledger = Ledger()
        self._clock: Callable[[], float] = lambda: 0.0
        self._marks_of: Callable[[OffloadKey, ReqContext], tuple[int, bytes]] = (
            lambda key, context: (1, NOBODY)
        )
        self._on_evicted: Callable[[bytes, int, Reason], None] = lambda key, ttl_s, reason: None
        self._missed: dict[OffloadKey, tuple[int, bytes]] = {}

    def bind(
        self,
        ledger: Ledger,
        clock: Callable[[], float],
        marks_of: Callable[[OffloadKey, ReqContext], tuple[int, bytes]],
        on_evicted: Callable[[bytes, int, Reason], None],
    ) -> None:
        """Connect the policy to the engine's lifetimes.

        Args:
            ledger: where the chunks' lifetimes are kept.
            clock: the ledger's clock, in seconds.
            marks_of: the lifetime in seconds and the owner that a request's plan gives to a key.
            on_evicted: called with each key that has left the tier, its TTL in seconds, and why.
        """
        self._ledger, self._clock = ledger, clock
        self._marks_of, self._on_evicted = marks_of, on_evicted

    def get(self, key: OffloadKey) -> ChunkStatus | None:
        return self._chunks.get(key)

    def on_store_miss(self, keys: Iterable[OffloadKey], req_context: ReqContext) -> None:
        # Called right before `insert`, which is not told for whom it inserts.
        self._missed = {key: self._marks_of(key, req_context) for key in keys}

    def insert(
        self, key: OffloadKey, chunk: ChunkStatus, req_context: ReqContext | None = None
    ) -> None:
        now = self._clock()
        self._chunks[key] = chunk
        if key not in self._ledger:
            ttl_s, owner = self._missed.get(key, (1, NOBODY))
            self._ledger.touch(key, ttl_s, now, owner)
        self._ledger.place(key, CPU)
        self._use(key, now)

    def remove(self, key: OffloadKey) -> None:
        del self._chunks[key]
        self._order.remove(key)
        self._ledger.displace(key, CPU)

    def touch(self, keys: Iterable[OffloadKey], req_context: ReqContext) -> None:
        now = self._clock()
        for key in reversed(list(keys)):
            if key in self._chunks:
                self._use(key, now)

    def on_request_finished(
        self,
        key_groups: Sequence[Sequence[OffloadKey]],
        insertion_only_keys: set[OffloadKey],
        reused_keys: set[OffloadKey],
        req_context: ReqContext,
    ) -> None:
        self.touch(order_request_keys(key_groups, req_context), req_context)

    def evict(
        self, n: int, protected: set[OffloadKey]
    ) -> list[tuple[OffloadKey, ChunkStatus]] | None:
        keys = self._order.victims(
            n, self._clock(), lambda key: key in protected or self._chunks[key].ref_cnt != 0
        )
        if keys is None:
            return None
        evicted = [(OffloadKey(key), self._chunks[OffloadKey(key)]) for key in keys]
        for key, _ in evicted:
            self._drop(key, Reason.CAPACITY)
        return evicted

    def clear(self) -> None:
        for key in list(self._chunks):
            self._drop(key, Reason.RESET)

    def _drop(self, key: OffloadKey, reason: Reason) -> None:
        entry = self._ledger.get(key)
        self.remove(key)
        self._on_evicted(key, entry.ttl_s if entry else 0, reason)

    def _use(self, key: OffloadKey, now: float) -> None:
        entry = self._ledger.get(key)
        if entry is not None:
            self._order.use(key, entry.ttl_s, now)


class CpuTier:
    """What CacheScope adds to a tiering manager: nothing expired or purged is found, or kept.

    Args:
        manager: vLLM's manager, whose primary tier runs `ScopePolicy`.
        is_expired: whether a key's lifetime is over.
        is_barred: whether a request must neither find a key nor store it.
    """

    def __init__(
        self,
        manager: TieringOffloadingManager,
        is_expired: Callable[[bytes], bool],
        is_barred: Callable[[OffloadKey, ReqContext], bool],
    ) -> None:
        self._primary: CPUPrimaryTierOffloadingManager = manager.primary_tier
        assert isinstance(self._primary._policy, ScopePolicy)
        self.policy = self._primary._policy
        # From 0.33 on vLLM may serve tiers from a thread of its own.
        self._lock = getattr(manager, "lock", None) or nullcontext()
        lookup, prepare_store = manager.lookup, manager.prepare_store

        # On the manager, so that no tier behind the primary one serves an expired key either.
        def live_lookup(key: OffloadKey, req_context: ReqContext, **kwargs: Any) -> LookupResult:
            if is_expired(key) or is_barred(key, req_context):
                return LookupResult.MISS
            return lookup(key, req_context, **kwargs)

        def prepare_live_store(
            keys: Iterable[OffloadKey], req_context: ReqContext, **kwargs: Any
        ) -> PrepareStoreOutput | None:
            kept = [key for key in keys if not is_barred(key, req_context)]
            return prepare_store(kept, req_context, **kwargs)

        manager.lookup = live_lookup  # type: ignore[method-assign]
        manager.prepare_store = prepare_live_store  # type: ignore[method-assign]

    def holds(self, key: bytes) -> bool:
        """Whether the tier holds ``key``, ready or not."""
        return self.policy.get(OffloadKey(key)) is not None

    def discard(self, keys: Iterable[bytes]) -> set[bytes]:
        """Free the chunks of ``keys`` at once.

        Returns:
            The keys whose chunks are in the middle of a transfer and must be discarded later.
        """
        with self._lock:
            return self._discard(keys)

    def _discard(self, keys: Iterable[bytes]) -> set[bytes]:
        busy: set[bytes] = set()
        freed: list[OffloadKey] = []
        for raw in keys:
            key = OffloadKey(raw)
            chunk = self.policy.get(key)
            if chunk is None:
                continue
            if chunk.ref_cnt != 0:
                busy.add(raw)
                continue
            # What the manager does itself after `CachePolicy.evict`.
            self.policy.remove(key)
            self._primary._num_evictable_cache_chunks -= 1
            self._primary._free_chunk(chunk)
            freed.append(key)
        if freed and self._primary.events is not None:
            self._primary.events.append(
                OffloadingEvent(keys=freed, medium=self._primary.medium, removed=True)
            )
        return busy
