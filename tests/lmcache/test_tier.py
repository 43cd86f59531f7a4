"""A tier over LMCache's adapters, between memory and real file systems and servers."""

import json
import os
import random
import threading
import time
from types import SimpleNamespace

import pytest

from tests.lmcache.conftest import anywhere, everywhere, in_files
from tests.lmcache.side import LMCacheSide
from tests.redis.engine_side import SLOT, content, keys
from tests.redis.servers import wait_until
from tests.redis.wall import Wall
from vllm_cachescope.cache.quotas import Quotas
from vllm_cachescope.cli.main import main
from vllm_cachescope.config import CONNECTOR, ConfigError, OrgQuota, load
from vllm_cachescope.connectors.lmcache import adapters, upkeep
from vllm_cachescope.connectors.vllm import config_check, remote_stores
from vllm_cachescope.connectors.vllm.findings import Status
from vllm_cachescope.tiers.envelope import HEADER_BYTES
from vllm_cachescope.tiers.local_usage import LocalUsage


@pytest.fixture
def start_side(start_side):
    """Nothing here is about being late: the sides have more time than anything takes."""

    def start(adapter, **options):
        return start_side(adapter, **{"load_deadline_s": 5.0, "timeout_s": 3.0, **options})

    return start


def purged(side: LMCacheSide, prefix: bytes) -> int:
    purge = side.tier.purge(prefix)
    wait_until(lambda: purge.over)
    assert purge.reason is None
    return purge.entries


def leave_a_moment() -> None:
    """Let the upkeep look once more."""
    time.sleep(1.5 * upkeep.UPKEEP_S)


@anywhere
def test_what_one_engine_stores_the_next_one_reads(place, start_side):
    side = start_side(place.adapter)
    side.put(keys(10), ttl_s=300)
    side.put(keys(20)[10:], ttl_s=3600)
    loaded = side.get_exact(keys(25))
    assert loaded.keys == dict.fromkeys(keys(10), 300) | dict.fromkeys(keys(20)[10:], 3600)
    side.close()
    fresh = start_side(place.adapter)
    assert fresh.get_exact(keys(25)).keys == loaded.keys
    assert fresh.tier.take_stats()["lookup", "miss"] == 5
    # There is nothing to store.
    fresh.put(keys(20))
    assert fresh.tier.take_stats()["store", "present"] == 20
    assert start_side(place.adapter, identity="another model").get(keys(20)).keys == {}


@everywhere
def test_a_value_is_a_header_and_the_block(place, start_side):
    side = start_side(place.adapter)
    key = keys(1)[0]
    side.put([key])
    (name,) = place.values()
    value = place.get(name)
    assert value[:4] == b"CSKV"
    assert value[HEADER_BYTES : HEADER_BYTES + SLOT] == content(key)
    assert len(value) % 4096 == 0 and not any(value[HEADER_BYTES + SLOT :])


@anywhere
def test_an_entry_lives_for_its_lifetime_after_its_last_use(place, start_side, wall):
    side = start_side(place.adapter)
    side.put(keys(4), ttl_s=300)
    wall.advance(200)
    # Used in memory: the store hears of it. A shorter lifetime takes nothing away.
    for key, ttl_s in zip(keys(4), (300, 3600, 30), strict=False):
        side.use([key], ttl_s)
    other = start_side(place.adapter)
    wait_until(lambda: _left_s(other, keys(4)[1], wall) > 3500)
    wait_until(lambda: _left_s(other, keys(4)[0], wall) > 290)
    wall.advance(99)
    assert set(other.get_exact(keys(4)).keys) == set(keys(4))
    wall.advance(2)
    for engine in (side, other, start_side(place.adapter)):
        assert set(engine.get_exact(keys(4)).keys) == set(keys(4)[:2])
    wall.advance(200)
    for engine in (side, other):
        assert set(engine.get_exact(keys(4)).keys) == {keys(4)[1]}


def _left_s(side: LMCacheSide, key: bytes, wall: Wall) -> float:
    """Return how much longer the store keeps an entry, by asking as a new engine would."""
    entry = adapters.Entry(side.keyspace.namespace, key)
    store = side.new_store()
    store.connect(time.monotonic() + 5)
    try:
        store.find([key], time.monotonic() + 5)
        return store.backend.entries.expiries.of(entry) / 1000 - wall()
    finally:
        store.close()


@everywhere
def test_an_entry_in_constant_use_is_not_written_all_the_time(place, start_side, wall):
    side = start_side(place.adapter)
    side.put(keys(1))
    (record,) = place.records()
    written = place.get(record)
    wall.advance(10)
    side.use(keys(1)[:1])
    leave_a_moment()
    assert place.get(record) == written
    wall.advance(10)
    side.use(keys(1)[:1])
    wait_until(lambda: place.records() and place.get(record) != written)
    (value,) = place.values()
    assert len(place.get(value)) > SLOT


@everywhere
def test_what_expires_between_the_lookup_and_the_load_is_gone(place, start_side, wall):
    side = start_side(place.adapter)
    side.put(keys(6))
    request, hits, _ = side.find(keys(6))
    assert len(hits) == 6
    wall.advance(301)
    side.tier.load(77, request, hits, [side.slot(i) for i in range(6)])
    assert side.step_until(77).loaded == ()
    assert side.tier.take_stats()["load", "gone"] == 6


@everywhere
def test_expired_entries_are_reclaimed_and_counted(place, start_side, wall):
    side = start_side(place.adapter)
    side.put(keys(10), ttl_s=300)
    side.put(keys(12)[10:], ttl_s=3600)
    wall.advance(301)
    wait_until(lambda: len(place.values()) == len(place.records()) == 2)
    # The tier learns of it when it has something to do.
    wait_until(lambda: side.get(keys(1)) and side.tier.take_stats()["reclaim", "expired"] == 10)
    # And they can be stored anew.
    side.put(keys(10))
    assert len(side.get_exact(keys(12)).keys) == 12


@everywhere
def test_another_engine_may_have_let_an_entry_live_on(place, start_side, wall):
    """The one that wrote it does not know, and must not reclaim it."""
    side, other = start_side(place.adapter), start_side(place.adapter)
    side.put(keys(2))
    other.find(keys(2))
    wall.advance(200)
    other.use(keys(2)[:1])
    third = start_side(place.adapter)
    wait_until(lambda: _left_s(third, keys(2)[0], wall) > 290)
    wall.advance(150)
    wait_until(lambda: len(place.values()) == 1)
    leave_a_moment()
    for engine in (side, other):
        assert set(engine.get_exact(keys(2)).keys) == {keys(2)[0]}


@in_files
def test_what_dead_engines_left_is_reclaimed(place, start_side, wall, monkeypatch):
    for identity in ("a model", "another model"):
        side = start_side(place.adapter, identity=identity)
        side.put(keys(50, identity))
        side.close()
    # One died in the middle of storing, another in the middle of deleting.
    place.remove(place.records()[0])
    place.remove(place.values()[-1])
    wall.advance(301)
    monkeypatch.setattr(upkeep, "FIRST_LIST_S", 0.0)
    monkeypatch.setattr(upkeep, "LIST_S", 0.0)
    side = start_side(place.adapter, identity="a third model")
    side.put(keys(3))
    wait_until(lambda: len(place.values()) == len(place.records()) == 3, 20)
    assert len(side.get_exact(keys(3)).keys) == 3


def test_an_adapter_that_lists_what_it_holds(start_side, wall, monkeypatch, tmp_path):
    adapter = {
        "type": "plugin",
        "module_path": "tests.lmcache.paging",
        "class_name": "PagingAdapter",
        "adapter_params": {"base_path": str(tmp_path / "store")},
    }
    side = start_side(adapter)
    side.put(keys(20))
    side.close()
    monkeypatch.setattr(upkeep, "FIRST_LIST_S", 0.0)
    side = start_side(adapter)
    side.put(keys(7, "more"))
    assert purged(side, keys(1)[0][:16]) == 27
    assert len(os.listdir(tmp_path / "store")) == 2
    side.put(keys(20))
    side.close()
    wall.advance(301)
    start_side(adapter)
    wait_until(lambda: len(os.listdir(tmp_path / "store")) == 2)


ACME, OTHER = b"acme....", b"other..."


@anywhere
def test_over_its_quota_an_organisation_loses_its_own_oldest(place, start_side):
    """None of these stores counts, so each engine counts what it has stored itself."""
    side = start_side(
        place.adapter, local_usage=LocalUsage(Quotas(SLOT, OrgQuota(quota=20 * SLOT), {}))
    )

    def prompt(owner: bytes, number: int) -> list[bytes]:
        return keys(5, f"prompt {number}", owner + bytes(8))

    def left(owner: bytes) -> list[int]:
        return [n for n in range(9) if len(side.get_exact(prompt(owner, n)).keys) == 5]

    for owner, prompts in ((OTHER, 3), (ACME, 8)):
        for number in range(prompts):
            side.put(prompt(owner, number))
    assert left(OTHER) == [0, 1, 2]
    assert left(ACME) == [4, 5, 6, 7]
    assert side.tier.take_stats()["evict", "quota"] == 20
    wait_until(lambda: len(place.values()) == len(place.records()) == 35)
    # What is used is not the oldest.
    side.use(prompt(ACME, 4))
    side.put(prompt(ACME, 8))
    assert left(ACME) == [4, 6, 7, 8]


@everywhere
def test_a_purge_deletes_what_begins_with_its_prefix(place, start_side):
    side = start_side(place.adapter)
    owned = {
        owner: keys(5, str(owner), owner)
        for owner in (ACME + b"session1", ACME + b"session2", OTHER + bytes(8))
    }
    for some in owned.values():
        side.put(some)
    everything = [key for some in owned.values() for key in some]
    purge = side.tier.purge(ACME + b"session1")
    wait_until(lambda: purge.over)
    assert len(place.values()) == len(place.records()) == 10
    assert set(side.get_exact(everything).keys) == {*everything} - {*owned[ACME + b"session1"]}
    purge = side.tier.purge(ACME)
    wait_until(lambda: purge.over)
    assert set(side.get_exact(everything).keys) == {*owned[OTHER + bytes(8)]}
    purge = side.tier.purge(b"")
    wait_until(lambda: purge.over)
    assert place.values() == place.records() == []
    # Where the adapter cannot list, nobody claims that all is gone.
    if place.adapter["type"] == "resp":
        assert "the 5 entries that this engine knew are deleted" in purge.reason
    else:
        assert (purge.entries, purge.reason) == (5, None)
    side.put(everything)
    assert len(side.get_exact(everything).keys) == 15


@in_files
def test_a_purge_reaches_what_other_engines_stored(place, start_side):
    for identity in ("a model", "another model"):
        side = start_side(place.adapter, identity=identity)
        side.put(keys(5, owner=ACME + bytes(8)))
        side.put(keys(5, owner=OTHER + bytes(8)))
        side.close()
    side = start_side(place.adapter, identity="a third model")
    assert purged(side, ACME) == 10
    assert purged(side, b"") == 10
    assert place.values() == place.records() == []


@everywhere
def test_the_secret_of_another_replica_is_told_apart(place, start_side, wall, caplog):
    side = start_side(place.adapter)
    stranger = start_side(place.adapter, secret=b"another secret of the tests")
    assert side.tier.usable
    assert not stranger.tier.usable
    assert "another secret" in stranger.tier.health()["reason"]
    stranger.put(keys(3))
    assert place.values() == []
    assert start_side(place.adapter, identity="m2", secret=b"y" * 20).tier.usable
    side.close()
    wall.advance(61)
    wait_until(lambda: stranger.tier.usable)
    stranger.put(keys(3))
    assert len(stranger.get_exact(keys(3)).keys) == 3


@everywhere
@pytest.mark.parametrize(
    "damage",
    [
        lambda value, chance: _flipped(value, chance.randrange(HEADER_BYTES)),
        lambda value, chance: _flipped(value, HEADER_BYTES + chance.randrange(SLOT)),
        lambda value, chance: value[: chance.randrange(len(value))],
    ],
    ids=["header", "block", "shorter"],
)
def test_a_damaged_value_is_noticed_and_deleted(place, start_side, damage):
    # Afterwards the adapter is made anew, for which some take half a second.
    side = start_side(place.adapter, timeout_s=3.0)
    chance = random.Random(5)
    side.put(keys(6))
    name = place.values()[2]
    value = damage(place.get(name), chance)
    place.put(name, value)
    damaged = next(key for key in keys(6) if key.hex() in name)
    found = side.get_exact(keys(6)).keys
    assert damaged not in found
    if place.adapter["type"] != "resp" or len(value) > SLOT:
        assert len(found) == 5
        assert side.tier.take_stats()["load", "damaged"] == 1
    # Otherwise the adapter has lost its place in the conversation, and others with this one.
    wait_until(lambda: name not in place.names())
    wait_until(lambda: side.put(keys(6)) and len(side.get_exact(keys(6)).keys) == 6)


def _flipped(value: bytes, at: int) -> bytes:
    return value[:at] + bytes([value[at] ^ 1]) + value[at + 1 :]


@anywhere
def test_a_damaged_record_costs_its_entry(place, start_side):
    side = start_side(place.adapter)
    side.put(keys(3))
    side.close()
    first, second, _ = place.records()
    place.put(first, _flipped(place.get(first), 12))
    place.put(second, place.get(second)[:10])
    fresh = start_side(place.adapter)
    # Whether both are found out at once depends on what else the adapter was busy with.
    wait_until(
        lambda: (
            len(fresh.get_exact(keys(3)).keys) == 1
            and len(place.values()) == len(place.records()) == 1
        )
    )
    fresh.put(keys(3))
    assert len(fresh.get_exact(keys(3)).keys) == 3


@pytest.mark.parametrize("place", ["resp"], indirect=True)
def test_a_damaged_record_costs_no_other_entry(place, start_side):
    """Though the adapter loses its place in the conversation, with all that is on its way."""
    side = start_side(place.adapter)
    side.put(keys(12))
    side.close()
    kept = keys(12)
    for key in (kept.pop(5), kept.pop(2)):
        (name,) = (name for name in place.records() if key.hex() in name)
        place.put(name, place.get(name)[:10])
    fresh = start_side({**place.adapter, "num_workers": 1})
    wait_until(lambda: list(fresh.get_exact(keys(12)).keys) == kept)


@everywhere
def test_a_store_that_is_emptied_fills_again(place, start_side):
    side = start_side(place.adapter)
    side.put(keys(5))
    for name in place.names():
        place.remove(name)
    assert side.get_exact(keys(5)).keys == {}
    wait_until(lambda: side.put(keys(5)) and len(side.get_exact(keys(5)).keys) == 5)


@anywhere
def test_closing_leaves_no_threads_and_no_descriptors(place, start_side):
    start_side(place.adapter).close()
    threads, files = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    side = start_side(place.adapter)
    side.put(keys(10))
    side.get(keys(10))
    assert len(set(threading.enumerate()) - threads) > 4
    side.close()
    wait_until(lambda: set(threading.enumerate()) <= threads)
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= files)


@pytest.mark.parametrize(
    ("adapter", "says"),
    [
        ({"type": "fss", "base_path": "/x"}, ["adapter.type", "'fss'", "fs, fs_native", "resp"]),
        ({"type": "fs"}, ["adapter", "base_path must be a non-empty string"]),
        ({"type": "fs", "base_path": 7}, ["base_path: 7"]),
        (
            {"type": "fs", "base_path": "/x", "use_direct": True},
            ["adapter.use_direct", "no such key for type fs", "base_path", "use_odirect"],
        ),
        (
            {"type": "resp", "host": "h", "port": "1", "password": "sesame"},
            ["port must be a positive integer", "host: 'h'"],
        ),
    ],
)
def test_a_mistake_names_the_key_the_value_and_what_is_allowed(adapter, says):
    with pytest.raises(ConfigError) as caught:
        adapters.parse(adapter)
    for words in says:
        assert words in str(caught.value)
    assert "sesame" not in str(caught.value)


def test_a_mistake_in_an_adapter_stops_the_start(capsys, monkeypatch):
    monkeypatch.setenv("CACHESCOPE_SECRET", "a secret of tests")
    tier = {"type": "lmcache", "name": "files", "adapter": {"type": "fs", "path": "/x"}}
    transfer = SimpleNamespace(
        kv_connector=CONNECTOR,
        kv_connector_extra_config={"tiers": [tier]},
    )
    with pytest.raises(ConfigError, match="tier files: adapter: base_path must be") as caught:
        config_check.read(transfer)
    assert main(["serve", "m", "--set", f"tiers={json.dumps([tier])}"]) == 2
    assert capsys.readouterr().err == f"{caught.value}\n"


def test_a_check_leaves_nothing_there(tmp_path):
    adapter = {"type": "fs", "base_path": str(tmp_path / "files")}
    tiers = [{"type": "lmcache", "adapter": adapter}]
    config = load({"secret": "a secret of the tests", "tiers": tiers})
    told = remote_stores.check(config.tiers[0], config)
    assert told.status is Status.OK and " answers; " in told.found
    assert list((tmp_path / "files").iterdir()) == []
    (tmp_path / "full").write_text("no directory")
    adapter["base_path"] = str(tmp_path / "full")
    config = load({"secret": "a secret of the tests", "tiers": tiers})
    assert remote_stores.check(config.tiers[0], config).status is Status.FAILURE
