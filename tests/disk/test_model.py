"""The store in a directory against a model of it, with a clock that passes when it is told to."""

import shutil
import tempfile
from pathlib import Path
from random import Random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.redis.engine_side import SECRET
from vllm_cachescope.cache.quotas import Quotas
from vllm_cachescope.config import OrgQuota
from vllm_cachescope.connectors import disk
from vllm_cachescope.connectors.disk.store import WORTH, DiskStore
from vllm_cachescope.tenancy.owner_tags import NOBODY, OwnerTags
from vllm_cachescope.tenancy.scope import Caller
from vllm_cachescope.tiers.envelope import HEADER_BYTES
from vllm_cachescope.tiers.keyspace import Keyspace, qualified, secret_digest
from vllm_cachescope.tiers.leases import Leases
from vllm_cachescope.tiers.store import Value, Written

SIZE = 1000
FILE = 4096
CAPACITY = 8
QUOTA = 3
TAGS = OwnerTags(SECRET)
OWNERS = [NOBODY, TAGS.of(Caller("acme", "s1")), TAGS.of(Caller("acme")), TAGS.of(Caller("zeta"))]
KEYS = [
    qualified(owner, Random(10 * i + j).randbytes(36))
    for i, owner in enumerate(OWNERS)
    for j in range(5)
]
QUOTAS = Quotas(SIZE, OrgQuota(), {OWNERS[1][:8]: OrgQuota(quota=QUOTA * SIZE)})
some_keys = st.lists(st.sampled_from(KEYS), min_size=1, max_size=6, unique=True)
ttls = st.sampled_from([2, 10, 11, 40])


class DiskStoreMachine(RuleBasedStateMachine):
    """Two engines on one directory; one of them may be killed and start anew.

    The model knows when each entry ends, as those on the disk do: no entry in it is one that
    should be gone, or gone that should be there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.place = Path(tempfile.mkdtemp()) / "tier"
        self.now = 1000.0
        self.ends: dict[bytes, float] = {}
        self.stores = [self.new_store(), self.new_store()]

    def teardown(self) -> None:
        for store in self.stores:
            store.close()
        shutil.rmtree(self.place.parent)

    def new_store(self) -> DiskStore:
        make = disk.stores(
            self.place,
            disk.Space(CAPACITY * FILE, 0),
            Keyspace({"model": "model"}),
            secret_digest(SECRET),
            Leases(SECRET),
            lambda: self.now,
            lambda: self.now,
            QUOTAS,
        )
        store = make()
        store.connect(self.now + 5)
        # What it deletes by itself, and when, is no step of the model's.
        if (thread := store.backend.upkeep.stop()) is not None:
            thread.join()
        return store

    def live(self) -> dict[bytes, float]:
        return {key: end for key, end in self.ends.items() if end > self.now}

    def evict(self, keys: list[bytes], limit: int) -> None:
        ordered = sorted(keys, key=self.ends.__getitem__)
        for key in ordered[: max(0, len(keys) - limit)]:
            del self.ends[key]

    def refresh(self, key: bytes, until: float) -> None:
        left = until - self.now
        if (until - self.ends[key]) * WORTH >= left > 0:
            self.ends[key] = max(until, self.ends[key])

    @rule(who=st.integers(0, 1), keys=some_keys, ttl=ttls, spread=st.integers(0, 2))
    def write(self, who: int, keys: list[bytes], ttl: int, spread: int) -> None:
        # No two ends are alike, so that what goes first is no matter of taste.
        untils = {
            key: self.now + ttl + i * spread + KEYS.index(key) / 100 for i, key in enumerate(keys)
        }
        values = [
            Value(key, key[:1] * HEADER_BYTES, memoryview(bytearray(key[-1:] * SIZE)), untils[key])
            for key in keys
        ]
        live = self.live()
        results = self.stores[who].write(values, self.now + 5)
        expected = [Written.PRESENT if key in live else Written.STORED for key in keys]
        assert results == expected
        self.ends = live
        for key in keys:
            if key in live:
                self.refresh(key, untils[key])
            else:
                self.ends[key] = untils[key]
        if any(result is Written.STORED for result in results):
            self.evict([key for key in self.ends if key[:8] == OWNERS[1][:8]], QUOTA)
            self.evict(list(self.ends), CAPACITY)

    @rule(who=st.integers(0, 1), keys=some_keys, ttl=ttls)
    def touch(self, who: int, keys: list[bytes], ttl: int) -> None:
        untils = {key: self.now + ttl + KEYS.index(key) / 100 for key in keys}
        self.stores[who].touch(list(untils.items()), self.now + 5)
        for key in set(keys) & self.live().keys():
            self.refresh(key, untils[key])

    @rule(who=st.integers(0, 1), keys=some_keys)
    def read(self, who: int, keys: list[bytes]) -> None:
        slots = [memoryview(bytearray(SIZE)) for _ in keys]
        heads = list(self.stores[who].read(keys, slots, lambda: self.now + 5))
        for key, slot, head in zip(keys, slots, heads, strict=True):
            assert head == (key[:1] * HEADER_BYTES if key in self.live() else None)
            assert head is None or bytes(slot) == key[-1:] * SIZE

    @rule(who=st.integers(0, 1), keys=some_keys)
    def drop(self, who: int, keys: list[bytes]) -> None:
        dropped = self.stores[who].drop(keys, self.now + 5)
        assert dropped >= len(set(keys) & self.live().keys())
        for key in keys:
            self.ends.pop(key, None)

    @rule(who=st.integers(0, 1), prefix=st.sampled_from([b"", *OWNERS, OWNERS[1][:8]]))
    def purge(self, who: int, prefix: bytes) -> None:
        gone = {key for key in self.live() if key.startswith(prefix)}
        assert self.stores[who].purge(prefix, self.now + 5) >= len(gone)
        self.ends = {key: end for key, end in self.ends.items() if not key.startswith(prefix)}

    @rule(seconds=st.sampled_from([0.1, 1, 3]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @rule(who=st.integers(0, 1))
    def start_anew(self, who: int) -> None:
        self.stores[who].close()
        self.stores[who] = self.new_store()

    @rule(who=st.integers(0, 1))
    def half_a_write(self, who: int) -> None:
        """A process is killed once it has written a file, and before that counts."""
        backend = self.stores[who].backend
        backend.directory.write(backend.new_file(), b"half", memoryview(b"a value"))

    @rule(who=st.integers(0, 1), key=st.sampled_from(KEYS))
    def lose_a_file(self, who: int, key: bytes) -> None:
        index = self.stores[who].backend.reopened(None, 5)
        entries = index.find(Keyspace({"model": "model"}).namespace, [key], -1)
        index.close()
        for entry in entries.values():
            self.stores[who].backend.remove_files([entry])
        # Whoever reads finds out, and no count goes wrong for it.
        slots = [memoryview(bytearray(SIZE)) for _ in KEYS]
        heads = list(self.stores[who].read(KEYS, slots, lambda: self.now + 5))
        held = {key for key, head in zip(KEYS, heads, strict=True) if head is not None}
        assert held == self.live().keys() - {key}
        self.ends.pop(key, None)

    @invariant()
    def both_find_the_same(self) -> None:
        live = self.live()
        for store in self.stores:
            assert store.find(KEYS, self.now + 5) == [key in live for key in KEYS]

    @invariant()
    def it_keeps_to_its_capacity(self) -> None:
        assert self.stores[0].greet(self.now + 5)["used_bytes"] <= CAPACITY * FILE


TestDiskStore = DiskStoreMachine.TestCase
TestDiskStore.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
