"""The order of eviction from the device, on vLLM's own pool of blocks."""

from vllm.v1.core.block_pool import BlockPool

from tests.engine.device_pool import pool_of
from vllm_cachescope.cache.ledger import Ledger
from vllm_cachescope.connectors.vllm.engine.tiers.device_order import DeviceOrder


def held(pool: BlockPool, keys: list[bytes]) -> list[int]:
    """Return which of ``keys`` can be read."""
    blocks = pool.cached_block_hash_to_block
    return [at for at, key in enumerate(keys) if blocks.get_one_block(key) is not None]


def test_what_is_over_goes_first_and_its_end_before_its_beginning() -> None:
    pool, keys = pool_of(8)
    assert DeviceOrder(pool, Ledger()).retire(keys[4:7], 0.0) == 3
    pool.get_new_blocks(2)
    assert held(pool, keys) == [0, 1, 2, 3, 4, 7]
    pool.get_new_blocks(2)
    assert held(pool, keys) == [1, 2, 3, 7]


def test_what_is_over_may_have_been_put_in_front_already() -> None:
    pool, keys = pool_of(8)
    order = DeviceOrder(pool, Ledger())
    order._staged = {keys[0]: 0.0}  # noqa: SLF001
    order.retire(keys[:2], 0.0)
    taken = pool.get_new_blocks(3)
    assert len({block.block_id for block in taken}) == 3
    assert held(pool, keys) == [3, 4, 5, 6, 7]
    assert pool.get_num_free_blocks() == 5
