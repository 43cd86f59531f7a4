"""The KV events of the tiers behind the device, by which routers place requests."""

from collections.abc import Callable, Container, Iterator
from typing import Any

from vllm.distributed.kv_events import KVCacheEvent
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import (
    OffloadingConnectorScheduler,
)
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_offload.base import (
    Medium,
    OffloadingEvent,
    make_offload_key,
)
from vllm.v1.kv_offload.tiering.manager import TieringOffloadingManager
from vllm.v1.request import Request

from vllm_cachescope.connectors.vllm.engine.tiers.cpu import ScopePolicy
from vllm_cachescope.connectors.vllm.engine.tiers.remote import remote_tiers


class TierEvents:
    """Makes vLLM's events of these tiers complete, and keeps them in order.

    vLLM's tracker notes what a chunk holds when the chunk is stored or found, and forgets it when
    the chunk's removal is published. All methods do nothing while KV events are off.

    Args:
        scheduler: vLLM's side of the connector in the scheduler.
    """

    def __init__(self, scheduler: OffloadingConnectorScheduler) -> None:
        self._scheduler = scheduler
        assert isinstance(scheduler.manager, TieringOffloadingManager)
        self._manager: TieringOffloadingManager = scheduler.manager
        self._tracker = tracker = scheduler._events_tracker
        self._enabled = tracker.config.enable_kv_cache_events
        self._events: list[KVCacheEvent] = []
        self._is_reset = False
        tracker._build_event_metadata = _with_extra_keys(tracker._build_event_metadata)  # type: ignore[method-assign]

    @property
    def enabled(self) -> bool:
        """Whether KV events are on."""
        return bool(self._enabled)

    @property
    def waiting(self) -> bool:
        """Whether a remote tier has something to announce that happened outside a step."""
        return any(remote.has_changes for remote in remote_tiers(self._manager))

    def note_loaded(self, request: Request, keys: Container[bytes]) -> None:
        """Note what the chunks ``keys`` hold, which a remote tier has loaded into the CPU tier for
        a request. vLLM itself notes it too late: when it looks them up once more."""
        if not self._enabled:
            return
        for group in self._scheduler.config.kv_group_configs:
            stride = group.hashes_per_chunk
            for chunk, block_hash in enumerate(request.block_hashes[stride - 1 :: stride]):
                key = make_offload_key(block_hash, group.group_idx)
                if key in keys:
                    self._tracker.record_lookup(request, group, chunk, key)

    def collect(self) -> None:
        """Translate what has happened so far. To be called before a step's stores are noted: an
        expired chunk may be stored again in the very step that drops it, and publishing its
        removal afterwards would forget what the new one holds."""
        if self._enabled:
            self._events += self._scheduler.take_events()

    def on_prefix_cache_reset(self) -> None:
        """The prefix cache was emptied. vLLM's event of that has routers forget all tiers."""
        self._is_reset = self._enabled

    def take(self) -> list[KVCacheEvent]:
        """Return the events since the last call."""
        self.collect()
        if self._is_reset:
            # In place of the single changes since then, which are part of it.
            self._events = list(self._tracker.take_events(self._inventory()))
            self._is_reset = False
        events, self._events = self._events, []
        return events

    def _inventory(self) -> Iterator[OffloadingEvent]:
        """Yield events that announce everything that these tiers hold."""
        policy = self._manager.primary_tier._policy
        assert isinstance(policy, ScopePolicy)
        yield OffloadingEvent(keys=policy.ready(), medium=Medium.CPU, removed=False)
        for remote in remote_tiers(self._manager):
            yield remote.inventory()


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
