"""The CPU tier: vLLM's own primary offloading tier, with our eviction policy and expiry."""

from collections import Counter
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

from vllm_cachescope.cache.eviction import LifetimeShare
from vllm_cachescope.cache.eviction_history import EvictionReason
from vllm_cachescope.cache.ledger import Ledger
from vllm_cachescope.cache.quotas import Quotas
from vllm_cachescope.tenancy.owner_tags import NOBODY, org_of

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
        self._on_evicted: Callable[..., None] = lambda key, ttl_s, reason: None
        self._missed: dict[OffloadKey, tuple[int, bytes]] = {}
        self._shares: Quotas | None = None
        # Organisations that may hold more than their quota.
        self._grown: set[bytes] = set()

    def bind(
        self,
        ledger: Ledger,
        clock: Callable[[], float],
        marks_of: Callable[[OffloadKey, ReqContext], tuple[int, bytes]],
        on_evicted: Callable[[bytes, int, EvictionReason], None],
        shares: Quotas | None = None,
    ) -> None:
        """Connect the policy to the engine's lifetimes. To be called before the first chunk.

        Args:
            ledger: where the chunks' lifetimes are kept.
            clock: the ledger's clock, in seconds.
            marks_of: the lifetime in seconds and the owner that a request's plan gives to a key.
            on_evicted: called with each key that has left the tier, its TTL in seconds, and why.
            shares: what each organisation may have of the tier; None for anything.
        """
        self._ledger, self._clock = ledger, clock
        self._marks_of, self._on_evicted = marks_of, on_evicted
        if shares is not None:
            self._shares, self._order = shares, LifetimeShare(shares.reserve)

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
        now = self._clock()
        own = self._too_many_with(protected, n, now)
        keys = self._order.victims(
            n - len(own), now, lambda key: key in own or self._must_stay(key, protected)
        )
        if keys is None:
            return None
        evicted = [(OffloadKey(key), self._chunks[OffloadKey(key)]) for key in (*own, *keys)]
        for key, _ in evicted:
            self.drop(key, EvictionReason.QUOTA if key in own else EvictionReason.CAPACITY)
        return evicted

    def too_many(self) -> list[bytes]:
        """Return the chunks that organisations hold beyond their quotas, their oldest, but for
        those in the middle of a transfer."""
        found: list[bytes] = []
        for org in list(self._grown) if self._shares else ():
            if over := self._shares.over(org, self._order.held(org)):
                found += self._order.victims_of(
                    org, over, self._clock(), lambda key: self._must_stay(key, set())
                )
            else:
                self._grown.discard(org)
        return found

    def _too_many_with(self, wanted: set[OffloadKey], most: int, now: float) -> set[bytes]:
        """Return up to ``most`` chunks that organisations will hold beyond their quotas once
        ``wanted`` are here: those make room for their own before anyone else does."""
        found: set[bytes] = set()
        if self._shares is None:
            return found
        newcomers = Counter(self._org(key) for key in wanted if key not in self._chunks)
        for org, more in newcomers.items():
            over = self._shares.over(org, self._order.held(org) + more)
            found.update(
                self._order.victims_of(
                    org,
                    min(over, most - len(found)),
                    now,
                    lambda key: self._must_stay(key, wanted),
                )
            )
        return found

    def _must_stay(self, key: bytes, protected: set[OffloadKey]) -> bool:
        return key in protected or self._chunks[OffloadKey(key)].ref_cnt != 0

    def _org(self, key: OffloadKey) -> bytes:
        entry = self._ledger.get(key)
        return org_of(entry.owner if entry else self._missed.get(key, (1, NOBODY))[1])

    def clear(self) -> None:
        for key in list(self._chunks):
            self.drop(key, EvictionReason.RESET)

    def drop(self, key: OffloadKey, reason: EvictionReason) -> None:
        """Forget ``key``, and say why."""
        entry = self._ledger.get(key)
        self.remove(key)
        self._on_evicted(key, entry.ttl_s if entry else 0, reason)

    def _use(self, key: OffloadKey, now: float) -> None:
        entry = self._ledger.get(key)
        if entry is None:
            return
        if self._shares is None:
            self._order.use(key, entry.ttl_s, now)
        else:
            self._order.use(key, entry.ttl_s, now, org_of(entry.owner))
            self._grown.add(org_of(entry.owner))


class CpuTier:
    """What CacheScope adds to a tiering manager: nothing expired or purged is found, or kept.

    Args:
        manager: vLLM's manager, whose primary tier runs `ScopePolicy`.
        is_expired: whether a key's lifetime is over.
        is_barred: whether a request must not find a key.
        is_unwanted: whether a request should not store a key.
    """

    def __init__(
        self,
        manager: TieringOffloadingManager,
        is_expired: Callable[[bytes], bool],
        is_barred: Callable[[OffloadKey, ReqContext], bool],
        is_unwanted: Callable[[OffloadKey, ReqContext], bool],
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
            wanted = [key for key in keys if not is_unwanted(key, req_context)]
            return prepare_store(wanted, req_context, **kwargs)

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

    def keep_quotas(self) -> None:
        """Have organisations lose what they hold beyond their quotas."""
        if keys := self.policy.too_many():
            with self._lock:
                self._discard(keys, EvictionReason.QUOTA)

    def _discard(self, keys: Iterable[bytes], reason: EvictionReason | None = None) -> set[bytes]:
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
            if reason is None:
                self.policy.remove(key)
            else:
                self.policy.drop(key, reason)
            self._primary._num_evictable_cache_chunks -= 1
            self._primary._free_chunk(chunk)
            freed.append(key)
        if freed and self._primary.events is not None:
            self._primary.events.append(
                OffloadingEvent(keys=freed, medium=self._primary.medium, removed=True)
            )
        return busy
