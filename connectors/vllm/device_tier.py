"""The device tier: vLLM's own prefix cache, made to forget what has expired."""

from collections.abc import Callable, Iterable
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock

DEVICE = "device"


class DeviceTier:
    """Follows what vLLM's block pool caches and evicts.

    Args:
        manager: vLLM's KV cache manager.
        before_lookup: called before each look-up in the prefix cache, so that nothing that has
            expired by then can be found.
        on_evicted: called with the key of a block that leaves the prefix cache.
        on_reset: called when the prefix cache is emptied.
    """

    def __init__(
        self,
        manager: KVCacheManager,
        before_lookup: Callable[[], None],
        on_evicted: Callable[[bytes], None],
        on_reset: Callable[[], None],
    ) -> None:
        self._pool: BlockPool = manager.block_pool
        self._pool.metrics_collector = _Observer(
            self._pool.metrics_collector, self, on_evicted, on_reset
        )
        lookup = manager.get_computed_blocks

        def get_computed_blocks(*args: Any, **kwargs: Any) -> Any:
            before_lookup()
            return lookup(*args, **kwargs)

        manager.get_computed_blocks = get_computed_blocks  # type: ignore[method-assign]

    def holds(self, key: bytes) -> bool:
        """Whether the prefix cache can serve ``key`` (block hash and group id)."""
        return self._pool.cached_block_hash_to_block.get_one_block(key) is not None

    def evict(self, keys: Iterable[bytes]) -> None:
        """Make the prefix cache forget ``keys``. Requests that run on their blocks run on."""
        for key in keys:
            while (block := self._pool.cached_block_hash_to_block.get_one_block(key)) is not None:
                self._pool.evict_blocks({block.block_id})


class _Observer:
    """Stands where vLLM's optional residency metrics collector stands, and passes on to it.

    The block pool tells it of every eviction while the block still has its hash.
    """

    def __init__(
        self,
        inner: Any,
        tier: DeviceTier,
        on_evicted: Callable[[bytes], None],
        on_reset: Callable[[], None],
    ) -> None:
        self._inner = inner
        self._tier = tier
        self._on_evicted = on_evicted
        self._on_reset = on_reset

    def on_block_allocated(self, block: KVCacheBlock) -> None:
        if self._inner is not None:
            self._inner.on_block_allocated(block)

    def on_block_accessed(self, block: KVCacheBlock) -> None:
        if self._inner is not None:
            self._inner.on_block_accessed(block)

    def on_block_evicted(self, block: KVCacheBlock) -> None:
        if self._inner is not None:
            self._inner.on_block_evicted(block)
        if block.block_hash is not None:
            self._on_evicted(block.block_hash)

    def reset(self) -> None:
        if self._inner is not None:
            self._inner.reset()
        self._on_reset()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)
