"""Which block goes, against a model that looks through all of them."""

import pickle
from collections import Counter
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.examples import examples
from vllm_cachescope.cache.eviction import LifetimeShare

TTLS = (300, 3600)
ORGS = (b"", b"acme", b"zeta")


@dataclass
class Block:
    ttl_s: int
    used_at: float
    org: bytes


class Model:
    """Blocks by key, in order of last use."""

    def __init__(self, reserves: dict[bytes, int]) -> None:
        self.blocks: dict[int, Block] = {}
        self.reserves = reserves

    def use(self, key: int, ttl_s: int, now: float, org: bytes) -> None:
        self.blocks.pop(key, None)
        self.blocks[key] = Block(ttl_s, now, org)

    def share(self, key: int, now: float) -> float:
        return (now - self.blocks[key].used_at) / self.blocks[key].ttl_s

    def check(self, chosen: list[int] | None, count: int, now: float, spare: set[int]) -> None:
        """Each one that was chosen must be as old as any that could have gone instead."""
        may = [key for key in self.blocks if key not in spare]
        assert (chosen is None) == (len(may) < count)
        if chosen is None:
            return
        assert len(set(chosen)) == len(chosen) == count
        held = Counter(block.org for block in self.blocks.values())
        for key in chosen:
            exposed = [
                k for k in may if held[self.blocks[k].org] > self.reserves[self.blocks[k].org]
            ]
            if exposed:
                assert key in exposed, "spared blocks go last"
            assert self.share(key, now) == max(self.share(k, now) for k in exposed or may)
            may.remove(key)
            held[self.blocks[key].org] -= 1


@settings(max_examples=examples(300), deadline=None)
@given(
    st.tuples(*[st.integers(0, 8) for _ in ORGS]),
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 29), st.integers(0, 2**20)),
        min_size=30,
        max_size=150,
    ),
)
def test_as_a_model_would(
    reserves: tuple[int, ...], operations: list[tuple[int, int, int]]
) -> None:
    model = Model(dict(zip(ORGS, reserves, strict=True)))
    order = LifetimeShare(lambda org: model.reserves[org])
    now = 0.0
    for kind, number, drawn in operations:
        now += drawn % 3
        spare = {key for key in range(30) if drawn >> (key % 20) & 3 == 0}
        if kind < 3:
            org, ttl_s = ORGS[number % 3], TTLS[drawn % 2]
            model.use(number, ttl_s, now, org)
            order.use(b"%d" % number, ttl_s, now, org)
        elif kind == 3:
            model.blocks.pop(number, None)
            order.remove(b"%d" % number)
        else:
            # Several times in a row: whatever one choice leaves behind must not mislead the next.
            for count, spared in ((number % 7 + 1, spare), (number % 5 + 1, set())):
                found = order.victims(count, now, lambda key, spared=spared: int(key) in spared)
                keys = None if found is None else [int(key) for key in found]
                model.check(keys, count, now, spared)
                if kind == 5 and found is not None:
                    for key in found:
                        order.remove(key)
                        del model.blocks[int(key)]
        assert len(order) == len(model.blocks)
        org = ORGS[drawn % 3]
        own = [key for key, block in model.blocks.items() if block.org == org and key not in spare]
        assert order.held(org) == sum(block.org == org for block in model.blocks.values())
        found = order.victims_of(
            org, number % 4 + 1, now, lambda key, spare=spare: int(key) in spare
        )
        oldest = sorted((model.share(key, now) for key in own), reverse=True)[: number % 4 + 1]
        assert [model.share(int(key), now) for key in found] == oldest


def two(org: bytes) -> int:
    return 2


def test_organisations_that_come_and_go_leave_nothing_behind() -> None:
    order = LifetimeShare(two)
    order.use(b"stays", 300, 0.0, b"org 0")
    for i in range(10_000):
        order.use(b"%d" % i, 300, float(i), b"org %d" % i)
        if i > 10:
            order.remove(b"%d" % (i - 10))
    assert len(order) == 12
    # All that is kept is of these 11 organisations: some 100 bytes each, not 10,000 times as many.
    assert len(pickle.dumps(order)) < 3000


def test_a_choice_among_many_organisations_looks_at_few() -> None:
    looked_at = 0

    def reserve(org: bytes) -> int:
        nonlocal looked_at
        looked_at += 1
        return 1

    order = LifetimeShare(reserve)
    for i in range(2000):
        order.use(b"spared %d" % i, 300, 0.0, b"small %d" % i)
    for i in range(100):
        order.use(b"%d" % i, 300, 1.0, b"large")
    looked_at = 0
    assert order.victims(50, 2.0, lambda key: False) == [b"%d" % i for i in range(50)]
    assert looked_at < 200
