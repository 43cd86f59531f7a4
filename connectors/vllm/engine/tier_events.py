"""The KV events of the tiers behind the device, by which routers place requests."""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from typing import Any

from cachetools import LRUCache
from vllm.distributed.kv_events import KVCacheEvent
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import (
    OffloadingConnectorScheduler,
)
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, BlockHashWithGroupId
from vllm.v1.kv_offload.base import (
    Medium,
    OffloadingEvent,
    OffloadKey,
    make_offload_key,
)
from vllm.v1.kv_offload.tiering.manager import TieringOffloadingManager
from vllm.v1.request import Request

from vllm_cachescope.connectors.vllm.engine.orphans import Front, Orphans
from vllm_cachescope.connectors.vllm.engine.tiers.cpu_policy import ScopePolicy
from vllm_cachescope.connectors.vllm.engine.tiers.remote import remote_tiers


class TierEvents:
    """Makes vLLM's events of these tiers complete, and keeps them in order.

    vLLM's tracker notes what a chunk holds when the chunk is stored or found, and forgets it when
    the chunk's removal is published. All methods do nothing while KV events are off.

    What happened at once is told in an order by which an index of prefixes can follow: no chunk is
    stored before the one in front of it, nor removed after it. vLLM's sets have none.

    Args:
        scheduler: vLLM's side of the connector in the scheduler.
        pool: vLLM's blocks on the device.
    """

    def __init__(self, scheduler: OffloadingConnectorScheduler, pool: BlockPool) -> None:
        self._scheduler = scheduler
        assert isinstance(scheduler.manager, TieringOffloadingManager)
        self._manager: TieringOffloadingManager = scheduler.manager
        self._tracker = tracker = scheduler._events_tracker
        self._enabled = tracker.config.enable_kv_cache_events
        self._events: list[KVCacheEvent] = []
        self._is_reset = False
        # What the chunks hold that are being loaded. No more than the CPU tier holds are at a time.
        self._loading: LRUCache[bytes, Any] = LRUCache(self._manager.primary_tier._num_chunks)
        self._pool = pool
        self._as_told = _as_told()
        self._orphans = Orphans(self._is_on_device, self._is_told_elsewhere)
        tracker._build_event_metadata = _with_extra_keys(tracker._build_event_metadata)  # type: ignore[method-assign]

    @property
    def enabled(self) -> bool:
        """Whether KV events are on."""
        return bool(self._enabled)

    @property
    def waiting(self) -> bool:
        """Whether there is something to announce that happened outside a step: what a remote tier
        says, or chunks that expired while they were being stored there and are dropped since."""
        if not self._enabled:
            return False
        return bool(self._events or self._manager.primary_tier.events) or any(
            remote.has_changes for remote in remote_tiers(self._manager)
        )

    def note_loading(self, request: Request, keys: Container[bytes]) -> None:
        """Note what the chunks ``keys`` hold, which a remote tier is about to load into the CPU
        tier for a request. vLLM itself notes it too late: when it looks them up once more, which
        may be never. Nor may it be noted with the tracker yet, which would forget it with a removal
        that comes before."""
        if not self._tracker.self_describing_enabled:
            return
        for group in self._scheduler.config.kv_group_configs:
            if group.sliding_window_size_in_chunks is not None:
                continue
            stride = group.hashes_per_chunk
            for chunk, block_hash in enumerate(request.block_hashes[stride - 1 :: stride]):
                key = make_offload_key(block_hash, group.group_idx)
                if key in keys:
                    build = self._tracker._build_event_metadata
                    self._loading[key] = build(request, group, chunk)

    def collect(self) -> None:
        """Translate what has happened so far. To be called before a step's stores are noted: an
        expired chunk may be stored again in the very step that drops it, and publishing its
        removal afterwards would forget what the new one holds."""
        if self._enabled:
            happened = self._manager.take_events()
            self._events += self._tracker.take_events(self._in_order(happened))

    def on_prefix_cache_reset(self) -> None:
        """The prefix cache was emptied. vLLM's event of that has routers forget all tiers."""
        self._is_reset = self._enabled

    def take(self) -> list[KVCacheEvent]:
        """Return the events since the last call."""
        self.collect()
        if self._is_reset:
            # In place of the single changes since then, which are part of it.
            inventory = self._in_order(self._inventory())
            self._orphans.forget()
            self._events = list(self._tracker.take_events(inventory))
            self._is_reset = False
        events, self._events = self._events, []
        return self._orphans.told(events)

    def _in_order(self, happened: Iterable[OffloadingEvent]) -> Iterator[OffloadingEvent]:
        """Yield events in their order, with the chunks of each in one that routers can follow."""
        noted = self._tracker._pending_event_metadata
        for (medium, removed, *_), alike in groupby(happened, _kind):
            first, *others = alike
            keys = [key for event in (first, *others) for key in event.keys]
            if medium is Medium.CPU and not removed:
                for key in keys:
                    loaded = self._loading.pop(key, None)
                    if loaded is not None:
                        noted.setdefault(key, loaded)
                    if (one := noted.get(key)) is not None:
                        # Else a removal just before, in the same batch, would have it forgotten.
                        one.active_residencies.add((medium, None))
                        self._note_front(one)
            ordered = _parents_first(keys, noted)
            yield replace(first, keys=ordered[::-1] if removed else ordered)

    def _note_front(self, chunk: Any) -> None:
        parent, front = chunk.parent_block_hash, Front(None, None)
        if parent is not None:
            key = make_offload_key(parent, chunk.group_idx)
            front = Front(key, (chunk.group_idx, self._as_told(parent)))
        self._orphans.note((chunk.group_idx, self._as_told(chunk.block_hashes[-1])), front)

    def _is_on_device(self, key: bytes) -> bool:
        # Looked up each time: vLLM makes another map when it empties the cache.
        held = self._pool.cached_block_hash_to_block
        return held.get_one_block(BlockHashWithGroupId(key)) is not None

    def _is_told_elsewhere(self, key: bytes) -> bool:
        chunk = self._tracker._pending_event_metadata.get(OffloadKey(key))
        if chunk is None:
            return False
        return any(medium is Medium.STORAGE for medium, _ in chunk.active_residencies)

    def _inventory(self) -> Iterator[OffloadingEvent]:
        """Yield events that announce everything that these tiers hold."""
        policy = self._manager.primary_tier._policy
        assert isinstance(policy, ScopePolicy)
        yield OffloadingEvent(keys=policy.ready(), medium=Medium.CPU, removed=False)
        for remote in remote_tiers(self._manager):
            yield remote.inventory()


def _kind(event: OffloadingEvent) -> tuple[Any, ...]:
    return event.medium, event.removed, event.locality, event.ownership, event.removal_expected


def _as_told() -> Callable[[BlockHash], Any]:
    """Return what makes of a block's hash what events have. vLLM's own asks the environment each
    time, which takes 3 µs: longer than all else that is done here for a chunk."""
    convert = kv_cache_utils.maybe_convert_block_hash
    probe = BlockHash(bytes(range(1, 33)))
    for one in (_as_it_is, _as_integer):
        if one(probe) == convert(probe):
            return one
    return convert


def _as_it_is(block_hash: BlockHash) -> Any:
    return block_hash


def _as_integer(block_hash: BlockHash) -> Any:
    return int.from_bytes(block_hash[-8:], "big")


def _parents_first(keys: list[OffloadKey], noted: Mapping[OffloadKey, Any]) -> list[OffloadKey]:
    """Return chunks so that none stands before the one in front of it in its prompt.

    Args:
        keys: the chunks.
        noted: what is known of them.
    """
    if len(keys) < 2:
        return keys
    parents: dict[OffloadKey, OffloadKey | None] = {}
    for key in keys:
        parents[key], one = None, noted.get(key)
        if one is not None and one.parent_block_hash is not None:
            parents[key] = make_offload_key(one.parent_block_hash, one.group_idx)
    ordered: list[OffloadKey] = []
    while parents:
        path: list[OffloadKey] = []
        key, front = parents.popitem()
        path.append(key)
        while front in parents:
            path.append(front)
            front = parents.pop(front)
        ordered += reversed(path)
    return ordered


def _with_extra_keys(build: Callable[..., Any]) -> Callable[..., Any]:
    """Return vLLM's ``build`` so that what it notes has the extra keys of each block, as the
    device's events have. Routers hash salts and images into their own keys."""

    def build_complete(
        request: Request, group: Any, chunk_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        noted = build(request, group, chunk_idx, *args, **kwargs)
        start, size = chunk_idx * group.tokens_per_chunk, group.tokens_per_block
        ends = range(start + size, start + group.tokens_per_chunk + 1, size)
        noted.extra_keys = tuple(
            kv_cache_utils.generate_block_hash_extra_keys(request, end - size, end, 0)[0]
            for end in ends
        )
        return noted

    return build_complete
