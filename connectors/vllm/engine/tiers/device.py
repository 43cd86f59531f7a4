"""The device tier: vLLM's own prefix cache, made to forget what has expired, and to keep shares."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

from vllm_cachescope.cache.eviction import LifetimeShare

DEVICE = "device"

PASSED_OVER = 1024
"""How many blocks vLLM is kept from at once, at most: half a millisecond's work."""


class DeviceTier:
    """Follows what vLLM's block pool caches and evicts.

    Args:
        manager: vLLM's KV cache manager.
        before_lookup: called before each look-up in the prefix cache, so that nothing that has
            expired by then can be found.
        after_lookup: called with a request that was looked up and the number of tokens found,
            before it is given blocks for the rest.
        on_evicted: called with the key of a block that leaves the prefix cache.
        on_reset: called when the prefix cache is emptied.
    """

    def __init__(
        self,
        manager: KVCacheManager,
        before_lookup: Callable[[], None],
        after_lookup: Callable[[Request, int], None],
        on_evicted: Callable[[bytes], None],
        on_reset: Callable[[], None],
    ) -> None:
        self._pool: BlockPool = manager.block_pool
        self._pool.metrics_collector = _Observer(
            self._pool.metrics_collector, self, on_evicted, on_reset
        )
        lookup = manager.get_computed_blocks

        def get_computed_blocks(request: Request, **kwargs: Any) -> Any:
            before_lookup()
            found = lookup(request, **kwargs)
            after_lookup(request, found[1])
            return found

        manager.get_computed_blocks = get_computed_blocks  # type: ignore[method-assign]

    def holds(self, key: bytes) -> bool:
        """Whether the prefix cache can serve ``key`` (block hash and group id)."""
        return self._pool.cached_block_hash_to_block.get_one_block(key) is not None

    def evict(self, keys: Iterable[bytes]) -> None:
        """Make the prefix cache forget ``keys``. Requests that run on their blocks run on."""
        for key in keys:
            while (block := self._pool.cached_block_hash_to_block.get_one_block(key)) is not None:
                self._pool.evict_blocks({block.block_id})

    def is_free(self, key: bytes) -> bool:
        """Whether the prefix cache holds ``key`` and no request runs on it."""
        block = self._pool.cached_block_hash_to_block.get_one_block(key)
        return block is not None and block.ref_cnt == 0

    def give_up(self, keys: Iterable[bytes]) -> None:
        """Make the prefix cache forget ``keys``, and use their blocks before all others."""
        queue = self._pool.free_block_queue
        for key in keys:
            while self.is_free(key):
                block = self._pool.cached_block_hash_to_block.get_one_block(key)
                self._pool.evict_blocks({block.block_id})
                queue.remove(block)
                queue.prepend_n([block])

    def spare(self, org_of: Callable[[bytes], bytes | None], order: LifetimeShare) -> None:
        """From here on have vLLM pass over blocks of organisations that hold no more than their
        reserve, while it finds others.

        Args:
            org_of: returns the organisation's tag of a key; None for a key that is not known.
            order: knows who is spared.
        """
        get_new_blocks = self._pool.get_new_blocks

        def sparing(num_blocks: int) -> list[KVCacheBlock]:
            self._pass_over(num_blocks, org_of, order)
            return get_new_blocks(num_blocks)

        self._pool.get_new_blocks = sparing  # type: ignore[method-assign]

    def _pass_over(
        self, wanted: int, org_of: Callable[[bytes], bytes | None], order: LifetimeShare
    ) -> None:
        """Move the spared blocks that vLLM would take next to the end of its queue: the queue
        stays one of last use among the spared and among the others."""
        queue = self._pool.free_block_queue
        taken: Counter[bytes] = Counter()
        spared: list[KVCacheBlock] = []
        block = queue.fake_free_list_head.next_free_block
        while wanted > 0 and len(spared) < PASSED_OVER and block is not queue.fake_free_list_tail:
            org = None if block.block_hash is None else org_of(block.block_hash)
            if org is not None and order.is_spared(org, taken[org]):
                spared.append(block)
            else:
                wanted -= 1
                if org is not None:
                    taken[org] += 1
            block = block.next_free_block
        for block in spared:
            queue.remove(block)
        queue.append_n(spared)


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
