"""A neighbour who may write anything to a store behind an adapter, and has not got the secret."""

from collections.abc import Callable

import pytest

from tests.lmcache.conftest import Place, everywhere
from tests.redis.engine_side import SLOT, content, keys
from tests.redis.servers import wait_until
from vllm_cachescope.connectors.lmcache import upkeep
from vllm_cachescope.tiers.envelope import HEADER_BYTES, Envelopes
from vllm_cachescope.tiers.jobs import Outgoing
from vllm_cachescope.tiers.leases import LEASE_BYTES, Leases

DAY_MS = 86_400_000

in_python = pytest.mark.parametrize("place", ["fs"], indirect=True)


@pytest.fixture
def start_side(start_side):
    """Nothing here is about being late: the sides have more time than anything takes."""

    def start(adapter, **options):
        return start_side(adapter, **{"load_deadline_s": 5.0, "timeout_s": 3.0, **options})

    return start


def named(names: list[str], key: bytes) -> str:
    (name,) = (name for name in names if key.hex() in name)
    return name


def replace(place: Place, name: str, front: bytes, behind: int = 0) -> None:
    """Put ``front`` into an object, from its byte ``behind`` on."""
    found = place.get(name)
    place.put(name, found[:behind] + front + found[behind + len(front) :])


def forged_value(key: bytes, namespace: str) -> bytes:
    block = Outgoing(key, memoryview(b"\x66" * SLOT), 86_400, 0.0)
    with Envelopes(b"a secret of the neighbour", namespace).sealing([block]) as (value,):
        return value.head + bytes(value.payload)


VALUES: dict[str, Callable[[Place, bytes, str], object]] = {
    "under another secret": lambda place, key, namespace: replace(
        place, named(place.values(), key), forged_value(key, namespace)
    ),
    "of another entry": lambda place, key, namespace: replace(
        place, named(place.values(), key), whole_value(place)
    ),
    "with another payload": lambda place, key, namespace: replace(
        place, named(place.values(), key), whole_value(place)[HEADER_BYTES:], HEADER_BYTES
    ),
    "with another TTL": lambda place, key, namespace: replace(
        place, named(place.values(), key), b"\xff", 10
    ),
}


def whole_value(place: Place) -> bytes:
    return place.get(named(place.values(), keys(1)[0]))


@everywhere
def test_a_value_that_is_not_genuine_is_a_miss_and_deleted(place, start_side):
    side = start_side(place.adapter)
    attacked = keys(len(VALUES), "attacked")
    side.put([*attacked, *keys(1)])
    for key, attack in zip(attacked, VALUES.values(), strict=True):
        attack(place, key, side.keyspace.namespace)
    served = side.get_exact([*attacked, *keys(1)]).keys
    assert [name for key, name in zip(attacked, VALUES, strict=True) if key in served] == []
    assert set(served) == {*keys(1)}
    assert side.tier.take_stats()["load", "damaged"] == len(VALUES)
    wait_until(lambda: len(place.values()) == 1)
    side.put(attacked)
    assert set(side.get_exact(attacked).keys) == set(attacked)


RECORDS: dict[str, Callable[[Place, str, int], object]] = {
    "under another secret": lambda place, name, later: replace(
        place, name, Leases(b"a secret of the neighbour").grant(keys(1)[0], later)
    ),
    "of another entry": lambda place, name, later: place.put(
        name, place.get(named(place.records(), keys(1)[0]))
    ),
    "with a later end": lambda place, name, later: replace(
        place, name, later.to_bytes(8, "little")
    ),
}


@everywhere
def test_a_lease_that_is_not_genuine_costs_its_entry(place, start_side, wall):
    side = start_side(place.adapter)
    attacked = keys(len(RECORDS), "attacked")
    side.put(attacked, ttl_s=300)
    side.put(keys(1), ttl_s=3600)
    side.close()
    for key, attack in zip(attacked, RECORDS.values(), strict=True):
        attack(place, named(place.records(), key), int(wall() * 1000) + DAY_MS)
    fresh = start_side(place.adapter)
    served = fresh.get_exact([*attacked, *keys(1)]).keys
    assert [name for key, name in zip(attacked, RECORDS, strict=True) if key in served] == []
    assert set(served) == {*keys(1)}
    wait_until(lambda: len(place.values()) == len(place.records()) == 1)


@in_python
def test_an_earlier_lease_ends_earlier(place, start_side, wall):
    side = start_side(place.adapter)
    side.put(keys(1), ttl_s=300)
    (record,) = place.records()
    earlier = place.get(record)
    wall.advance(200)
    side.use(keys(1), 300)
    wait_until(lambda: place.records() and place.get(record)[:LEASE_BYTES] != earlier[:LEASE_BYTES])
    side.close()
    place.put(record, earlier)
    wall.advance(99)
    assert start_side(place.adapter).get_exact(keys(1)).keys == {keys(1)[0]: 300}
    place.put(record, earlier)
    wall.advance(2)
    assert start_side(place.adapter).get_exact(keys(1)).keys == {}


@in_python
def test_entries_under_another_secret_are_left_alone_until_they_expire(
    place, start_side, wall, monkeypatch
):
    """Servers of other models may share the store with a secret of their own."""
    other = start_side(place.adapter, identity="m2", secret=b"another secret of the tests")
    other.put(keys(5), ttl_s=300)
    other.close()
    place.remove(place.records()[0])
    monkeypatch.setattr(upkeep, "FIRST_LIST_S", 0.0)
    monkeypatch.setattr(upkeep, "LIST_S", 0.0)
    side = start_side(place.adapter)
    side.put(keys(3, "ours"), ttl_s=3600)
    # A value without a lease goes in the second search.
    wait_until(lambda: len(place.values()) == 7)
    assert len(place.records()) == 7
    wall.advance(301)
    wait_until(lambda: len(place.values()) == len(place.records()) == 3)


@everywhere
def test_encrypted_blocks_come_back(place, start_side):
    side = start_side(place.adapter, encrypt=True)
    side.put(keys(10), ttl_s=300)
    side.close()
    assert start_side(place.adapter, encrypt=True).get_exact(keys(10)).keys == dict.fromkeys(
        keys(10), 300
    )
    value, block = place.get(named(place.values(), keys(1)[0])), content(keys(1)[0])
    assert not any(block[i : i + 8] in value for i in range(0, SLOT, SLOT // 8))
    assert start_side(place.adapter).get(keys(10)).keys == {}
