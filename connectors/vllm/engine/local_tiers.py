"""The local tiers, device and CPU, kept in step with the ledger."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_offload.base import PrepareStoreOutput, ReqContext
from vllm.v1.kv_offload.tiering.manager import TieringOffloadingManager

from vllm_cachescope.cache.eviction_history import (
    EvictionHistory,
    EvictionReason,
    EvictionRecord,
)
from vllm_cachescope.cache.ledger import Entry, Ledger
from vllm_cachescope.cache.quotas import Quotas
from vllm_cachescope.cache.runs import Ended, RequestSignals
from vllm_cachescope.config.eviction import EvictionSettings
from vllm_cachescope.connectors.vllm.engine.counts import Counts
from vllm_cachescope.connectors.vllm.engine.tiers.base import TierParent
from vllm_cachescope.connectors.vllm.engine.tiers.cpu import CpuTier
from vllm_cachescope.connectors.vllm.engine.tiers.cpu_order import make_learned
from vllm_cachescope.connectors.vllm.engine.tiers.cpu_policy import CPU
from vllm_cachescope.connectors.vllm.engine.tiers.device import DEVICE, DeviceTier
from vllm_cachescope.connectors.vllm.engine.tiers.device_order import DeviceOrder
from vllm_cachescope.connectors.vllm.engine.tiers.device_quotas import DeviceQuotas


class LocalTiers:
    """Has the device and the CPU tier drop what the ledger drops, and the ledger displace what
    they evict. Every block that leaves both is recorded in the history.

    Args:
        parent: gets the tiers' calls.
        ledger: the lifetimes of all blocks.
        history: how blocks left.
        kv_cache: vLLM's manager of the device's blocks.
        offloading: vLLM's manager of the CPU tier and those behind it.
        quotas: what organisations may have of the device and the CPU tier, by the tier's name.
        eviction: which chunks leave the CPU tier first.
        clock: the ledger's clock, in seconds.
        counts: counts what leaves.
    """

    def __init__(
        self,
        parent: TierParent,
        ledger: Ledger,
        history: EvictionHistory,
        kv_cache: KVCacheManager,
        offloading: TieringOffloadingManager,
        quotas: Mapping[str, Quotas],
        eviction: EvictionSettings,
        clock: Callable[[], float],
        counts: Counts,
    ) -> None:
        self._ledger = ledger
        self._history = history
        self._clock = clock
        self._counts = counts
        self._cpu = CpuTier(offloading, parent, quotas.get(CPU), eviction)
        self._device = DeviceTier(kv_cache, parent)
        self._device_quotas: DeviceQuotas | None = None
        if (device_quotas := quotas.get(DEVICE)) is not None:
            self._device_quotas = DeviceQuotas(device_quotas, self._device, ledger, clock)
        # Behind the quotas, whose reserves change what vLLM takes next as well.
        order = None
        if eviction.device == "learned":
            order = make_learned(eviction, kv_cache.block_pool.num_gpu_blocks)
        self._device_order = DeviceOrder(kv_cache.block_pool, ledger, order)
        # Chunks that expired or were purged in the middle of a transfer. They are no longer in
        # the ledger, and dropped from the CPU tier when the transfer is over.
        self._overdue: set[bytes] = set()
        self._keeps_no_copies = False

    # Where a block takes room once, on the device or in memory.

    def keep_no_copies(self, stores_late: bool) -> None:
        """From here on store in memory what the device evicts, and evict from there first what the
        device holds as well; see `CpuTier.keep_no_copies`. To be called before the first block."""
        self._keeps_no_copies = True
        self._cpu.keep_no_copies(self._device.held, stores_late)

    @property
    def has_evicted(self) -> bool:
        """Whether the device has evicted anything that `end_step` has not noted."""
        return self._device.has_evicted

    def store_evicted(self, context: ReqContext) -> tuple[list[int], PrepareStoreOutput] | None:
        """Make room in memory for what the device has evicted for the step that is being scheduled;
        return the device's blocks and what they are to be copied to. None if nothing is.

        Args:
            context: the request that stands for the store.
        """
        evicted = self._device.evicted_from()
        # vLLM evicts a prompt from its end.
        in_order = list(reversed(evicted))
        # First, so that nothing takes the place of what is there already.
        there = set(filter(self._cpu.holds, in_order))
        self._cpu.left_device(key for key in in_order if key in there)
        keys = [
            key
            for key in in_order
            if key not in there and key in self._ledger and not self.is_expired(key)
        ]
        stored = self._cpu.store_evicted(keys, context) if keys else None
        if stored is None or not stored.keys_to_store:
            return None
        return [evicted[key] for key in stored.keys_to_store], stored

    def end_step(self) -> None:
        """Note what was evicted for the step that was scheduled, once what was to be stored of it
        is. Where copies are kept it is noted whenever somebody asks."""
        self._displace(self._device.take_evicted(), EvictionReason.CAPACITY)

    # Blocks.

    def on_device(self, key: bytes) -> bool:
        """Whether the prefix cache holds ``key``."""
        return self._device.holds(key)

    def is_expired(self, key: bytes) -> bool:
        """Whether no tier may serve ``key`` any more."""
        return key in self._overdue or self._ledger.is_expired(key, self._clock())

    def use(
        self, key: bytes, ttl_s: int, now: float, owner: bytes, user: bytes, on_device: bool
    ) -> bool:
        """Start or refresh the lifetime of a block that is used now.

        Args:
            key: the block.
            ttl_s: its TTL in seconds.
            now: the time in seconds.
            owner: whose it is.
            user: whose request uses it, as the owner of its session's own blocks.
            on_device: whether the prefix cache holds it.

        Returns:
            Whether the block was not cached before.
        """
        is_new = self._ledger.touch(key, ttl_s, now, owner, user)
        if is_new:
            self._history.drop(key)
        if on_device:
            self._ledger.place(key, DEVICE)
            self._device_order.use(key, ttl_s, now)
            if self._keeps_no_copies:
                self._cpu.came_to_device(key)
        if key in self._overdue:
            # The copy in the CPU tier has the same content, and may stay.
            self._overdue.remove(key)
            self._ledger.place(key, CPU)
        return is_new

    def drop_purged(self, key: bytes, ttl_s: int) -> None:
        """Drop a block from the prefix cache that is not in the ledger: its owner was purged before
        it was computed."""
        self._device.drop([key])
        self._left_device([key])
        purged = EvictionRecord(EvictionReason.PURGE, ttl_s, self._clock(), DEVICE)
        self._history.record(key, purged)

    # What is known of their future.

    def note_ending(self, nonce: str, ended: Ended) -> bool:
        """Note how the answer to a request ended whose prompt has ``nonce``; return whether its
        blocks are in the CPU tier's order already."""
        self._device_order.tell(nonce, ended)
        return self._cpu.note_ending(nonce, ended)

    def end_request(self, keys: Sequence[bytes], signals: RequestSignals, nonce: str) -> None:
        """Note that a request is over that has used ``keys``."""
        self._device_order.use_request(keys, self._clock(), signals, nonce)

    def retire(self, keys: Sequence[bytes], at: float) -> dict[str, int]:
        """Have both tiers evict ``keys``, of which it is known that they are not needed, before
        others of their class, the last ones first; return how many each has of them. They can be
        read all the same, while they are there, and a use after ``at`` (seconds on the ledger's
        clock) keeps them."""
        on_device = self._device_order.retire(keys, at)
        return {DEVICE: on_device, CPU: self._cpu.retire(keys)}

    def now(self) -> float:
        """Return the time on the ledger's clock, in seconds."""
        return self._clock()

    # What the tiers hold.

    def resident(self) -> list[tuple[str, int, int]]:
        """Return ``(tier, ttl_s, entries)`` for each tier and TTL class there ever was."""
        self._displace_evicted()
        return list(self._ledger.resident())

    def held(self, tier: str) -> dict[bytes, int]:
        """Return how many entries of each organisation a tier holds, by the organisation's tag."""
        self._displace_evicted()
        return self._ledger.held(tier)

    # Expiry and purges.

    def drop_expired(self) -> int:
        """Drop everything that has expired, and enforce quotas; return how many entries have
        expired."""
        self._displace_evicted()
        expired = self._ledger.pop_expired(self._clock())
        for key, entry in expired:
            self._record(key, entry, EvictionReason.TTL, entry.expires_at)
        self._drop(expired, EvictionReason.TTL)
        self.enforce_quotas()
        return len(expired)

    def purge(self, prefix: bytes) -> dict[str, int]:
        """Drop all blocks whose owner begins with ``prefix``; return how many each tier held."""
        self.drop_expired()
        purged = self._ledger.purge(prefix)
        now = self._clock()
        for key, entry in purged:
            self._record(key, entry, EvictionReason.PURGE, now)
        return self._drop(purged, EvictionReason.PURGE)

    def _record(self, key: bytes, entry: Entry, reason: EvictionReason, at: float) -> None:
        tier = CPU if CPU in entry.tiers else DEVICE
        self._history.record(key, EvictionRecord(reason, entry.ttl_s, at, tier))

    def _drop(
        self, entries: Sequence[tuple[bytes, Entry]], reason: EvictionReason
    ) -> dict[str, int]:
        """Drop what the ledger has dropped from the tiers; return how many each held."""
        on_device = [entry for _, entry in entries if DEVICE in entry.tiers]
        in_memory = [(key, entry) for key, entry in entries if CPU in entry.tiers]
        now = self._clock()
        for entry in on_device:
            self._counts.add_eviction(DEVICE, reason, entry, now, was_last=CPU not in entry.tiers)
        for _, entry in in_memory:
            self._counts.add_eviction(CPU, reason, entry, now, was_last=True)
        if entries:
            # All of them: a load may have just brought one to the device.
            self._device.drop(key for key, _ in entries)
            self._device_order.remove(key for key, _ in entries)
            self._left_device(key for key, _ in entries)
        self._overdue.update(key for key, _ in in_memory)
        if self._overdue:
            self._overdue = self._cpu.drop(self._overdue)
        return {DEVICE: len(on_device), CPU: len(in_memory)}

    # Quotas.

    def quota_used(self) -> dict[str, float]:
        """Return the largest share of its quota that an organisation holds, by the names of the
        tiers with quotas."""
        used = {CPU: self._cpu.fullest()}
        if self._device_quotas is not None:
            used[DEVICE] = self._device_quotas.fullest()
        return {tier: share for tier, share in used.items() if share is not None}

    def enforce_quotas(self) -> None:
        """Evict what organisations hold beyond their quotas, but for blocks in use."""
        self._cpu.enforce_quotas()
        if self._device_quotas is not None:
            self._displace_evicted()
            self._evict_from_device(self._device_quotas.excess())

    def retry_quotas(self) -> None:
        """Have the next `enforce_quotas` look again at blocks that were in use at the last one."""
        if self._device_quotas is not None:
            self._device_quotas.retry()

    def make_room(self, newcomers: Counter[bytes], wanted: Collection[bytes]) -> None:
        """Evict from the device what organisations will hold beyond their quotas.

        Args:
            newcomers: how many blocks are about to be computed, by owner.
            wanted: keys that the same request reads, and that stay.
        """
        if self._device_quotas is not None:
            self._displace_evicted()
            self._evict_from_device(self._device_quotas.excess_with(newcomers, wanted))

    @property
    def has_device_quotas(self) -> bool:
        """Whether `make_room` and `note_change` do anything."""
        return self._device_quotas is not None

    def note_change(self, owners: Iterable[bytes]) -> None:
        """Note that blocks of ``owners`` came into the prefix cache, or that requests began or
        ended that run on them."""
        if self._device_quotas is not None:
            for owner in owners:
                self._device_quotas.note_change(owner)

    def _evict_from_device(self, keys: Collection[bytes]) -> None:
        if not keys:
            return
        self._device.evict(keys)
        gone = ((key, None) for key in keys if not self._device.holds(key))
        self._displace(gone, EvictionReason.QUOTA)

    # What the tiers evict by themselves.

    def on_cpu_evicted(
        self, key: bytes, entry: Entry, reason: EvictionReason, by: bytes | None
    ) -> None:
        """Note that the CPU tier evicted ``key``, for an organisation's blocks if that is known,
        and displaced it in the ledger."""
        self._note_evicted(key, entry, reason, CPU, by)

    def on_prefix_cache_reset(self) -> None:
        """Note that the prefix cache was emptied."""
        self._device_order.clear()
        cleared = list(self._ledger.clear_tier(DEVICE))
        for key, entry in cleared:
            self._note_evicted(key, entry, EvictionReason.RESET, DEVICE)
        self._left_device(key for key, _ in cleared)

    def _displace_evicted(self) -> None:
        """Have the ledger displace what vLLM has evicted from the device."""
        if not self._keeps_no_copies:
            self.end_step()

    def _displace(
        self, evicted: Iterable[tuple[bytes, bytes | None]], reason: EvictionReason
    ) -> None:
        gone: list[bytes] = []
        for key, by in evicted:
            gone.append(key)
            entry = self._ledger.get(key)
            if entry is not None and DEVICE in entry.tiers:
                self._ledger.displace(key, DEVICE)
                self._note_evicted(key, entry, reason, DEVICE, by)
        if gone:
            self._device_order.remove(gone)
            self._left_device(reversed(gone))

    def _left_device(self, keys: Iterable[bytes]) -> None:
        """Tell the CPU tier what the device does not hold any more, where that means something to
        it."""
        if self._keeps_no_copies:
            self._cpu.left_device(keys)

    def _note_evicted(
        self,
        key: bytes,
        entry: Entry,
        reason: EvictionReason,
        tier: str,
        by: bytes | None = None,
    ) -> None:
        now, was_last = self._clock(), key not in self._ledger
        self._counts.add_eviction(tier, reason, entry, now, was_last, by)
        if was_last:
            self._history.record(key, EvictionRecord(reason, entry.ttl_s, now, tier))
