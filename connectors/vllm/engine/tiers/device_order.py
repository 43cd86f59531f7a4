"""The order of eviction from the device: what is known not to return goes before all else."""

from collections.abc import Iterable, Sequence

from cachetools import FIFOCache
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashWithGroupId, KVCacheBlock

from vllm_cachescope.cache.learned_order import LearnedOrder, Piece
from vllm_cachescope.cache.ledger import Ledger
from vllm_cachescope.cache.runs import Ended, RequestSignals

STAGED = 32
"""So many blocks are chosen at once where the learned order chooses: that costs as much as one."""

MAX_UNTOLD = 4096
"""Of so many requests that are over it is still waited for how their answers ended."""


class DeviceOrder:
    """Has vLLM take blocks of ended conversations where it would evict others, then those that a
    learned order chooses if there is one, and leaves its queue of free blocks alone otherwise.

    Nothing is moved before vLLM needs room: until then blocks that were never used, or hold nothing
    to be read, go first as they do without this. What is used again meanwhile is spared.

    Args:
        pool: vLLM's pool of the device's blocks; has to be made after all others who change what it
            takes next.
        ledger: knows when a block was used last.
        order: the learned order, empty; None to leave vLLM's own.
    """

    def __init__(self, pool: BlockPool, ledger: Ledger, order: LearnedOrder | None = None) -> None:
        self._pool = pool
        self._ledger = ledger
        self._order = order
        # With when it was known, in seconds on the ledger's clock; first to go first.
        self._over: dict[bytes, float] = {}
        # What was put in front for the learned order, with when it was used last.
        self._staged: dict[bytes, float] = {}
        self._untold: FIFOCache[str, bytes] = FIFOCache(MAX_UNTOLD)
        self._now = 0.0
        get_new_blocks = pool.get_new_blocks

        def get_ended_first(num_blocks: int) -> list[KVCacheBlock]:
            if self._over or self._order:
                self._stage(num_blocks)
            return get_new_blocks(num_blocks)

        pool.get_new_blocks = get_ended_first  # type: ignore[method-assign]

    def __len__(self) -> int:
        return len(self._over)

    # What the learned order is told.

    def use(self, key: bytes, ttl_s: int, now: float) -> None:
        """Note that a request that is not over uses a block of the device at ``now``."""
        if self._order is not None:
            self._now = now
            self._order.use(key, ttl_s, now)

    def use_request(
        self, keys: Iterable[bytes], now: float, signals: RequestSignals, nonce: str
    ) -> None:
        """Note that a request is over that has used ``keys``; see `LearnedOrder.use_request`."""
        if self._order is None:
            return
        self._now = now
        pieces: list[Piece] = []
        piece: list[bytes] = []
        for key in keys:
            if (entry := self._ledger.get(key)) is None or self._find(key) is None:
                continue
            if not pieces or pieces[-1][1] != entry.ttl_s:
                piece = []
                pieces.append((piece, entry.ttl_s, b""))
            piece.append(key)
        self._order.use_request(pieces, now, signals)
        if nonce and pieces:
            self._untold[nonce] = piece[-1]

    def tell(self, nonce: str, ended: Ended) -> None:
        """Note how the answer to a request that is over ended."""
        key = self._untold.pop(nonce, None)
        if key is not None and self._order is not None:
            self._order.tell(key, ended)

    def remove(self, keys: Iterable[bytes]) -> None:
        """Note that the device no longer holds ``keys``."""
        if self._order is not None:
            self._order.remove_all(keys)

    def clear(self) -> None:
        """Note that the device is empty."""
        self._over.clear()
        self._staged.clear()
        if self._order is not None:
            self._order.clear()

    # What goes first.

    def retire(self, keys: Sequence[bytes], now: float) -> int:
        """Have vLLM evict ``keys`` of a prompt before others, the last one first, unless they are
        used after ``now`` (seconds on the ledger's clock); return how many of them are there.

        Those in use count from when they are free.
        """
        here = 0
        for key in reversed(keys):
            if self._find(key) is not None:
                self._over[key] = now
                here += 1
        if len(self._over) > self._pool.num_gpu_blocks:
            # Most of them are gone: there are no more blocks than that.
            self._over = {key: at for key, at in self._over.items() if self._find(key) is not None}
        return here

    def _stage(self, wanted: int) -> None:
        """Put blocks where vLLM takes its next ``wanted`` ones, instead of others that can be
        read and are worth more."""
        queue = self._pool.free_block_queue
        empty: list[KVCacheBlock] = []
        readable = 0
        block = queue.fake_free_list_head.next_free_block
        while len(empty) + readable < wanted and block is not None:
            if block is queue.fake_free_list_tail:
                return  # vLLM refuses to give that many.
            if block.block_hash is None or self._is_staged(block.block_hash):
                empty.append(block)
            else:
                readable += 1
            block = block.next_free_block
        if not readable:
            return
        chosen = self._take(readable)
        if self._order is not None and len(chosen) < readable:
            chosen += self._choose(readable - len(chosen), {block.block_id for block in chosen})
        if not chosen:
            return
        # What is over may have been put in front already.
        first = list({block.block_id: block for block in (*empty, *chosen)}.values())
        for block in first:
            queue.remove(block)
        queue.prepend_n(first)

    def _is_staged(self, key: bytes) -> bool:
        at, entry = self._staged.get(key), self._ledger.get(key)
        return at is not None and (entry is None or entry.used_at == at)

    def _choose(self, wanted: int, taken: set[int]) -> list[KVCacheBlock]:
        """Return the free blocks that the learned order gives first, ``wanted`` or some more."""
        assert self._order is not None
        order = self._order

        def must_stay(key: bytes) -> bool:
            block = self._find(key)
            return block is None or block.ref_cnt > 0 or block.block_id in taken

        keys = order.victims_up_to(max(wanted, STAGED), self._now, must_stay)
        self._staged = {
            key: 0.0 if (entry := self._ledger.get(key)) is None else entry.used_at for key in keys
        }
        return [block for key in keys if (block := self._find(key)) is not None]

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
