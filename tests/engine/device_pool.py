"""A pool of vLLM's blocks on a device, without an engine."""

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id


def pool_of(blocks: int) -> tuple[BlockPool, list[bytes]]:
    """Return a pool whose blocks are all free and can be read, and their keys; vLLM takes the first
    one next."""
    pool = BlockPool(blocks + 1, True, 16)
    taken = pool.get_new_blocks(blocks)
    keys: list[bytes] = []
    for number, block in enumerate(taken):
        key = make_block_hash_with_group_id(BlockHash(b"%032d" % number), 0)
        block.set_block_hash(key, 16)
        pool.cached_block_hash_to_block.insert(key, block)
        keys.append(key)
    pool.free_blocks(taken)
    return pool, keys
