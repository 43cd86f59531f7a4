"""The order of eviction from the device: what is known not to return goes before all else."""

from collections.abc import Iterable

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashWithGroupId, KVCacheBlock

from vllm_cachescope.cache.ledger import Ledger


class DeviceOrder:
    """Has vLLM take blocks of ended conversations where it would evict others, and leaves its
    queue of free blocks alone otherwise.

    Nothing is moved before vLLM needs room: until then blocks that were never used, or hold nothing
    to be read, go first as they do without this. What is used again meanwhile is spared.

    Args:
        pool: vLLM's pool of the device's blocks; has to be made after all others who change what it
            takes next.
        ledger: knows when a block was used last.
    """

    def __init__(self, pool: BlockPool, ledger: Ledger) -> None:
        self._pool = pool
        self._ledger = ledger
        # With when it was known, in seconds on the ledger's clock; first to go first.
        self._over: dict[bytes, float] = {}
        get_new_blocks = pool.get_new_blocks

        def get_ended_first(num_blocks: int) -> list[KVCacheBlock]:
            if self._over:
                self._stage(num_blocks)
            return get_new_blocks(num_blocks)

        pool.get_new_blocks = get_ended_first  # type: ignore[method-assign]

    def __len__(self) -> int:
        return len(self._over)

    def retire(self, keys: Iterable[bytes], now: float) -> int:
        """Have vLLM evict ``keys`` before others, in that order, unless they are used after ``now``
        (seconds on the ledger's clock); return how many of them are there.

        Those in use count from when they are free.
        """
        here = 0
        for key in keys:
            if self._find(key) is not None:
                self._over[key] = now
                here += 1
        if len(self._over) > self._pool.num_gpu_blocks:
            # Most of them are gone: there are no more blocks than that.
            self._over = {key: at for key, at in self._over.items() if self._find(key) is not None}
        return here

    def _stage(self, wanted: int) -> None:
        """Put blocks of ended conversations where vLLM takes its next ``wanted`` blocks, instead of
        others that can be read."""
        queue = self._pool.free_block_queue
        empty: list[KVCacheBlock] = []
        readable = 0
        block = queue.fake_free_list_head.next_free_block
        while len(empty) + readable < wanted and block is not None:
            if block is queue.fake_free_list_tail:
                return  # vLLM refuses to give that many.
            if block.block_hash is None:
                empty.append(block)
            else:
                readable += 1
            block = block.next_free_block
        chosen = self._take(readable)
        if not chosen:
            return
        first = [*empty, *chosen]
        for block in first:
            queue.remove(block)
        queue.prepend_n(first)

    def _take(self, wanted: int) -> list[KVCacheBlock]:
        """Return up to so many free blocks of ended conversations, and forget them."""
        chosen: list[KVCacheBlock] = []
        busy: dict[bytes, float] = {}
        while self._over and len(chosen) < wanted:
            key = next(iter(self._over))
            at = self._over.pop(key)
            block, entry = self._find(key), self._ledger.get(key)
            if block is None or (entry is not None and entry.used_at > at):
                continue
            if block.ref_cnt == 0 and not block.is_null:
                chosen.append(block)
            else:
                busy[key] = at
        self._over |= busy
        return chosen

    def _find(self, key: bytes) -> KVCacheBlock | None:
        return self._pool.cached_block_hash_to_block.get_one_block(BlockHashWithGroupId(key))
