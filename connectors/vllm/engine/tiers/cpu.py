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
from vllm.v1.kv_offload.tiering.manager import (
    CPUPrimaryTierOffloadingManager,
    TieringOffloadingManager,
)

from vllm_cachescope.cache.eviction_history import EvictionReason
from vllm_cachescope.cache.quotas import Quotas
from vllm_cachescope.cache.runs import Ended
from vllm_cachescope.config.eviction import EvictionSettings
from vllm_cachescope.connectors.vllm.engine.tiers.base import TierParent
from vllm_cachescope.connectors.vllm.engine.tiers.cpu_order import make_order
from vllm_cachescope.connectors.vllm.engine.tiers.cpu_policy import ScopePolicy


class CpuTier:
    """vLLM's tiering manager, changed so that it neither finds nor keeps expired or purged chunks.

    Args:
        manager: vLLM's manager, whose primary tier runs `ScopePolicy`.
        parent: says what may be looked up and stored.
        quotas: what each organisation may have of the tier; None for no limits.
        eviction: which chunks leave first.
    """

    def __init__(
        self,
        manager: TieringOffloadingManager,
        parent: TierParent,
        quotas: Quotas | None,
        eviction: EvictionSettings,
    ) -> None:
        self._primary: CPUPrimaryTierOffloadingManager = manager.primary_tier
        assert isinstance(self._primary._policy, ScopePolicy)
        self._policy = self._primary._policy
        self._policy.bind(parent, quotas, make_order(eviction, quotas, self._primary._num_chunks))
        # From 0.33 on vLLM may serve tiers from a thread of its own, and holds the manager's lock
        # while it calls the manager; see `offloading.make_lock_reentrant`.
        self._lock = getattr(manager, "lock", None) or nullcontext()
        lookup, prepare_store = manager.lookup, manager.prepare_store

        # On the manager and not its primary tier, so that remote tiers serve no expired key either.
        def live_lookup(
            key: OffloadKey, req_context: ReqContext, *args: Any, **kwargs: Any
        ) -> LookupResult:
            if not parent.may_read(key, req_context):
                return LookupResult.MISS
            return lookup(key, req_context, *args, **kwargs)

        def prepare_live_store(
            keys: Iterable[OffloadKey], req_context: ReqContext, *args: Any, **kwargs: Any
        ) -> PrepareStoreOutput | None:
            wanted = [key for key in keys if parent.may_store(key, req_context)]
            if self._stores_late:
                room = self._primary._get_num_free_chunks()
                new = [key for key in wanted if self._policy.get(key) is None]
                left_out = set(new[room:])
                wanted = [key for key in wanted if key not in left_out]
            return prepare_store(wanted, req_context, *args, **kwargs)

        self._prepare_store = prepare_store
        self._stores_late = False
        manager.lookup = live_lookup  # type: ignore[method-assign]
        manager.prepare_store = prepare_live_store  # type: ignore[method-assign]

    def keep_no_copies(self, on_device: Callable[[bytes], bool], stores_late: bool) -> None:
        """From here on evict what the device holds as well before all else; see `store_evicted`.

        Args:
            on_device: whether the device holds a block, or has just evicted it.
            stores_late: whether what is computed is stored here only while there is room, and
                otherwise once the device evicts it. Not where remote tiers are to have it at once.
        """
        self._policy.keep_no_copies(on_device)
        self._stores_late = stores_late

    def came_to_device(self, key: bytes) -> None:
        """Note that the device holds ``key``."""
        self._policy.came_to_device(key)

    def left_device(self, keys: Iterable[bytes]) -> None:
        """Note that the device does not hold ``keys`` any more, in prompt order."""
        with self._lock:
            self._policy.left_device(keys)

    def store_evicted(
        self, keys: Sequence[bytes], context: ReqContext
    ) -> PrepareStoreOutput | None:
        """Make room for what the device has just evicted, and is worth it; return what vLLM's
        manager does for a store, None if nothing is to be stored.

        Args:
            keys: what was evicted and is not here, in prompt order.
            context: the request that stands for the store.
        """
        with self._lock:
            wanted = self._policy.worth_keeping(keys, self._primary._get_num_free_chunks())
            return self._prepare_store(wanted, context) if wanted else None

    def holds(self, key: bytes) -> bool:
        """Whether ``key`` is here, or on its way here."""
        return self._policy.get(OffloadKey(key)) is not None

    def drop(self, keys: Iterable[bytes]) -> set[bytes]:
        """Drop ``keys``, which have expired or were purged, and free their chunks.

        Returns:
            The keys whose chunks are in the middle of a transfer and must be dropped later.
        """
        with self._lock:
            return self._free(keys)

    def fullest(self) -> float | None:
        """Return the largest share of its quota that an organisation holds; None without quotas."""
        return self._policy.fullest()

    def note_ending(self, nonce: str, ended: Ended) -> bool:
        """Note how the answer to a request ended; return whether the request is known here."""
        with self._lock:
            return self._policy.note_ending(nonce, ended)

    def retire(self, keys: Iterable[bytes]) -> int:
        """Evict ``keys`` before others; return how many of them are here."""
        with self._lock:
            return self._policy.retire(keys)

    def enforce_quotas(self) -> None:
        """Evict what organisations hold beyond their quotas."""
        if keys := self._policy.excess():
            with self._lock:
                self._free(keys, EvictionReason.QUOTA)

    def _free(self, keys: Iterable[bytes], reason: EvictionReason | None = None) -> set[bytes]:
        busy: set[bytes] = set()
        freed: list[OffloadKey] = []
        for raw in keys:
            key = OffloadKey(raw)
            chunk = self._policy.get(key)
            if chunk is None:
                continue
            if chunk.ref_cnt != 0:
                busy.add(raw)
                continue
            # What vLLM's manager does after `CachePolicy.evict`.
            if reason is None:
                self._policy.remove(key)
            else:
                self._policy.drop(key, reason)
            self._primary._num_evictable_cache_chunks -= 1
            self._primary._free_chunk(chunk)
            freed.append(key)
        if freed and self._primary.events is not None:
            self._primary.events.append(
                OffloadingEvent(keys=freed, medium=self._primary.medium, removed=True)
            )
        return busy
