"""What routers are told of the CPU tier comes in an order by which they can follow."""

import random
from typing import Any

import msgspec
import pytest
from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVCacheEvent

from tests.engine.engine import BLOCK
from tests.routers.dynamo import DynamoReader
from tests.routers.llmd import LlmdReader
from vllm_cachescope.connectors.vllm.engine.orphans import LOOKS, Front, Orphans

pytestmark = pytest.mark.engine

KIND: dict[str, Any] = {"lora_id": None, "lora_name": None, "group_idx": 0}
CPU, GPU = "CPU", "GPU"


def stored(medium: str, *chain: int, parent: int | None = None) -> BlockStored:
    return BlockStored(
        block_hashes=list(chain),
        parent_block_hash=parent,
        token_ids=[token for block in chain for token in [block] * BLOCK],
        block_size=BLOCK,
        medium=medium,
        kv_cache_spec_kind="full_attention",
        **KIND,
    )


def removed(medium: str, *blocks: int) -> BlockRemoved:
    return BlockRemoved(block_hashes=list(blocks), medium=medium, group_idx=0)


class Engine:
    """What an engine tells: blocks 1, 2, 3… follow each other in one prompt."""

    def __init__(self) -> None:
        self.device: set[int] = set()
        self.cpu: set[int] = set()
        self.remote: set[int] = set()
        self.orphans = Orphans(
            lambda key: int.from_bytes(key) in self.device,
            lambda key: int.from_bytes(key) in self.remote,
        )
        self.llmd, self.dynamo = LlmdReader(BLOCK), DynamoReader(BLOCK)
        self._told: set[tuple[str, int]] = set()

    def step(self, device: list[KVCacheEvent], others: list[KVCacheEvent]) -> list[KVCacheEvent]:
        """Tell a step's events; return what is told of the other tiers."""
        for event in others:
            if isinstance(event, BlockStored) and event.medium == CPU:
                for block in event.block_hashes:
                    front = Front(None, None)
                    if block > 1:
                        front = Front((block - 1).to_bytes(4), (0, block - 1))
                    self.orphans.note((0, block), front)
        told = list(self.orphans.told(others))
        for event in (*device, *told):
            data = msgspec.msgpack.decode(msgspec.msgpack.encode(event))
            for block in event.block_hashes:
                key = event.medium, block
                assert (key in self._told) == isinstance(event, BlockRemoved), "told twice"
                self._told ^= {key}
            self.llmd.read(data)
            self.dynamo.read(data)
        return told


def test_a_beginning_that_is_evicted_while_the_rest_is_loaded():
    """llm-d's index has no place for what it knows nothing in front of, and does not wait."""
    engine = Engine()
    engine.device = {1, 2}
    engine.step([stored(GPU, 1, 2)], [])
    engine.device = set()
    # The prompt waits for 3 meanwhile, which a remote tier holds.
    engine.step([removed(GPU, 2), removed(GPU, 1)], [])
    engine.cpu = {3}
    late = stored(CPU, 3, parent=2)
    assert engine.step([], [late]) == [] and len(engine.orphans) == 1
    lost = LlmdReader(BLOCK)
    for event in (late, stored(GPU, 1, 2)):
        lost.read(msgspec.msgpack.decode(msgspec.msgpack.encode(event)))
    assert lost.held(CPU) == set(), "llm-d keeps such blocks: they need not be held back"
    engine.device = {1, 2}
    assert engine.step([stored(GPU, 1, 2)], []) == [late]
    assert engine.llmd.held(CPU) == engine.dynamo.held(CPU) == {3}


def test_what_goes_before_it_is_told_was_never_there():
    engine = Engine()
    assert engine.step([], [stored(CPU, 3, parent=2)]) == []
    assert engine.step([], [removed(CPU, 3)]) == []
    engine.device = {1, 2}
    assert engine.step([stored(GPU, 1, 2)], []) == []
    assert len(engine.orphans) == 0


def test_a_remote_copy_of_the_beginning_is_enough():
    engine = Engine()
    engine.step([], [stored("STORAGE", 1)])
    engine.remote = {1}
    assert len(engine.step([], [stored(CPU, 2, parent=1), stored(CPU, 3, parent=2)])) == 2


def test_no_step_looks_at_all_and_all_are_told_in_the_end():
    looks, device = 0, set[bytes]()

    def on_device(key: bytes) -> bool:
        nonlocal looks
        looks += 1
        return key in device

    orphans = Orphans(on_device, lambda _: False)
    fronts = [number.to_bytes(4) for number in range(10 * LOOKS)]
    events = []
    for number, key in enumerate(fronts):
        orphans.note((0, number), Front(key, (0, -1 - number)))
        events.append(stored(CPU, number, parent=-1 - number))
        # Each has one behind it, which waits for it alone.
        orphans.note((0, 10_000 + number), Front(number.to_bytes(8), (0, number)))
        events.append(stored(CPU, 10_000 + number, parent=number))
    assert orphans.told(events) == []
    device.update(fronts)
    told: list[int] = []
    for _ in range(2 * 10):
        looks = 0
        step = orphans.told([])
        assert looks <= LOOKS
        told += [event.block_hashes[0] for event in step if isinstance(event, BlockStored)]
    assert len(orphans) == 0 and sorted(told) == sorted({*told})
    assert all(told.index(number) < told.index(10_000 + number) for number in range(10 * LOOKS))


@pytest.mark.parametrize("seed", range(30))
def test_routers_know_all_that_a_prompt_can_use(seed):
    chance = random.Random(seed)
    engine, blocks = Engine(), range(1, 7)
    for _ in range(200):
        device: list[KVCacheEvent] = []
        others: list[KVCacheEvent] = []
        for block in chance.sample(blocks, 4):
            front = block - 1
            known = {*engine.device, 0}
            if chance.random() < 0.5:
                # The device computes, and so has all that is in front; it evicts what it likes.
                if block in engine.device:
                    engine.device.remove(block)
                    device.append(removed(GPU, block))
                elif front in known:
                    engine.device.add(block)
                    device.append(stored(GPU, block, parent=front or None))
            elif block in engine.cpu:
                engine.cpu.remove(block)
                others.append(removed(CPU, block))
            else:
                engine.cpu.add(block)
                others.append(stored(CPU, block, parent=front or None))
        engine.step(device, others)
        there, usable = engine.device | engine.cpu, 0
        while usable + 1 in there:
            usable += 1
        for reader in (engine.llmd, engine.dynamo):
            for medium, held in ((GPU, engine.device), (CPU, engine.cpu)):
                reached = {block for block in held if block <= usable}
                assert reached <= reader.held(medium) <= held, medium
