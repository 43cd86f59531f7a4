"""The device tier: vLLM's own prefix cache."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import BlockHashWithGroupId, KVCacheBlock
from vllm.v1.request import Request

from vllm_cachescope.cache.eviction import LifetimeShare
from vllm_cachescope.cache.ledger import Ledger
from vllm_cachescope.connectors.vllm.engine.tiers.base import TierParent
from vllm_cachescope.tenancy.owner_tags import org_of

DEVICE = "device"

MAX_PASSED_OVER = 1024
"""How many spared blocks are passed over at one allocation at most: half a millisecond's work."""


_LOOKUPS = ("get_computed_blocks", "get_computed_blocks_for_connector")
"""The methods of vLLM's manager that look up a prompt. The second, which vLLM has from 0.33 on, may
call the first."""


class DeviceTier:
    """Follows what vLLM's block pool caches and evicts, and has it drop and evict blocks.

    Args:
        manager: vLLM's KV cache manager.
        parent: is told of look-ups and resets.
    """

    def __init__(self, manager: KVCacheManager, parent: TierParent) -> None:
        self._pool: BlockPool = manager.block_pool
        self._parent = parent
        self._evicted: list[bytes] = []
        # The blocks that they were in.
        self._evicted_from: dict[bytes, int] = {}
        # For which organisation each key of the other list was evicted, as far as is known.
        self._evicted_for: dict[bytes, bytes] = {}
        self._pool.metrics_collector = _Observer(self._pool.metrics_collector, self)  # type: ignore[assignment]
        for name in _LOOKUPS:
            if hasattr(manager, name):
                setattr(manager, name, _followed(getattr(manager, name), parent))
        manager.allocate_slots = self._named(manager.allocate_slots)  # type: ignore[method-assign]

    def holds(self, key: bytes) -> bool:
        """Whether the prefix cache can serve ``key`` (block hash and group id)."""
        return self._find(key) is not None

    def is_free(self, key: bytes) -> bool:
        """Whether the prefix cache holds ``key`` and no request runs on its block."""
        block = self._find(key)
        return block is not None and block.ref_cnt == 0

    def drop(self, keys: Iterable[bytes]) -> None:
        """Drop ``keys`` from the prefix cache. Requests that run on their blocks run on."""
        for key in keys:
            while (block := self._find(key)) is not None:
                self._drop(block)

    def evict(self, keys: Iterable[bytes]) -> None:
        """Drop those of ``keys`` that no request runs on, and have vLLM reuse their blocks before
        all others."""
        queue = self._pool.free_block_queue
        for key in keys:
            while (block := self._find(key)) is not None and block.ref_cnt == 0:
                self._drop(block)
                queue.remove(block)
                queue.prepend_n([block])

    def take_evicted(self) -> list[tuple[bytes, bytes | None]]:
        """Return the keys that vLLM has evicted since the last call, and that the prefix cache
        does not hold in another block, or again; each with the tag of the organisation whose
        request needed the block, if that is known."""
        evicted, self._evicted = self._evicted, []
        evicted_for, self._evicted_for = self._evicted_for, {}
        self._evicted_from.clear()
        # A key may have been in two blocks: two requests computed it at once, say.
        gone = [key for key in dict.fromkeys(evicted) if not self.holds(key)]
        return [(key, evicted_for.get(key)) for key in gone]

    @property
    def has_evicted(self) -> bool:
        """Whether `take_evicted` has anything to tell."""
        return bool(self._evicted)

    def evicted_from(self) -> dict[bytes, int]:
        """Return the keys that `take_evicted` will return, with the numbers of the blocks that held
        them. Until the step that is being scheduled is computed, these hold them still."""
        return {key: block for key, block in self._evicted_from.items() if not self.holds(key)}

    def held(self, key: bytes) -> bool:
        """Whether the prefix cache holds ``key``, or held it and `take_evicted` has not told."""
        return key in self._evicted_from or self.holds(key)

    def keep_reserves(
        self, ledger: Ledger, order: LifetimeShare, account_of: Callable[[bytes], bytes]
    ) -> None:
        """From here on have vLLM pass over blocks of accounts that hold no more than their
        reserve, while it finds others.

        Args:
            ledger: knows whose a block is.
            order: knows which accounts are spared.
            account_of: returns the account that blocks of an owner count towards.
        """
        get_new_blocks = self._pool.get_new_blocks

        def get_unreserved_blocks(num_blocks: int) -> list[KVCacheBlock]:
            self._pass_over(num_blocks, ledger, order, account_of)
            return get_new_blocks(num_blocks)

        self._pool.get_new_blocks = get_unreserved_blocks  # type: ignore[method-assign]

    def on_evicted(self, key: bytes, block: int) -> None:
        """vLLM evicts ``key`` from a block, by its number. Whether the prefix cache holds another
        one shows only afterwards: see `take_evicted`."""
        self._evicted.append(key)
        self._evicted_from[key] = block

    def on_reset(self) -> None:
        """vLLM empties the prefix cache."""
        self._evicted.clear()
        self._evicted_for.clear()
        self._evicted_from.clear()
        self._parent.on_prefix_cache_reset()

    def _find(self, key: bytes) -> KVCacheBlock | None:
        return self._pool.cached_block_hash_to_block.get_one_block(BlockHashWithGroupId(key))

    def _drop(self, block: KVCacheBlock) -> None:
        # The pool calls this an eviction too, and tells the observer: it is none of vLLM's.
        known = len(self._evicted)
        self._pool.evict_blocks({block.block_id})
        for key in self._evicted[known:]:
            self._evicted_from.pop(key, None)
        del self._evicted[known:]

    def _named(self, allocate: Callable[..., Any]) -> Callable[..., Any]:
        """Return vLLM's function that gives a request blocks, and note for whom it evicts some."""

        def allocate_and_name(request: Request, *args: Any, **kwargs: Any) -> Any:
            known = len(self._evicted)
            blocks = allocate(request, *args, **kwargs)
            if len(self._evicted) > known:
                plan = self._parent.plan_of(request.request_id)
                if plan is not None:
                    org = org_of(plan.owner)
                    self._evicted_for.update((key, org) for key in self._evicted[known:])
            return blocks

        return allocate_and_name

    def _pass_over(
        self,
        wanted: int,
        ledger: Ledger,
        order: LifetimeShare,
        account_of: Callable[[bytes], bytes],
    ) -> None:
        """Move the spared blocks that vLLM would take next to the end of its queue. Both the spared
        blocks and the others stay in order of last use."""
        queue = self._pool.free_block_queue
        taken: Counter[bytes] = Counter()
        spared: list[KVCacheBlock] = []
        block = queue.fake_free_list_head.next_free_block
        while wanted > 0 and len(spared) < MAX_PASSED_OVER:
            if block is None or block is queue.fake_free_list_tail:
                break
            entry = None if block.block_hash is None else ledger.get(block.block_hash)
            account = None if entry is None else account_of(entry.owner)
            if account is not None and order.is_spared(account, taken[account]):
                spared.append(block)
            else:
                wanted -= 1
                if account is not None:
                    taken[account] += 1
            block = block.next_free_block
        for block in spared:
            queue.remove(block)
        queue.append_n(spared)


def _followed(lookup: Callable[..., Any], parent: TierParent) -> Callable[..., Any]:
    def followed_lookup(request: Request, *args: Any, **kwargs: Any) -> Any:
        parent.on_prefix_lookup()
        found = lookup(request, *args, **kwargs)
        blocks, tokens, *rest = found
        parent.on_prefix_found(request, tokens)
        if rest and rest[0] == 0:
            # Where vLLM itself sees no position at which windows should be kept for later prompts.
            rest[0] = parent.next_checkpoint(request, tokens)
        return blocks, tokens, *rest

    return followed_lookup


class _Observer:
    """Stands where vLLM's optional residency metrics collector stands, and calls it in turn.

    The block pool tells it of every eviction while the block still has its hash.

    Args:
        inner: vLLM's collector; None if there is none.
        tier: is told of evictions and resets.
    """

    def __init__(self, inner: Any, tier: DeviceTier) -> None:
        self._inner = inner
        self._tier = tier

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
            self._tier.on_evicted(block.block_hash, block.block_id)

    def reset(self) -> None:
        if self._inner is not None:
            self._inner.reset()
        self._tier.on_reset()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)
