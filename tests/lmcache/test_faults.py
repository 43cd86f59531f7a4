"""What is wrong with a server behind an adapter is never more than a miss, within the deadline."""

import threading
import time

import pytest

from tests.lmcache.conftest import Place, everywhere
from tests.lmcache.side import LMCacheSide
from tests.redis.engine_side import SLACK_S, SLOT, ask_until_left_alone, assert_in_time, keys
from tests.redis.servers import RedisServer, wait_until
from vllm_cachescope.connectors import lmcache

resp = pytest.mark.parametrize("place", ["resp"], indirect=True)


def assert_recovers(side: LMCacheSide) -> None:
    wait_until(lambda: side.tier.usable)
    new = keys(10, "recovered")
    wait_until(lambda: side.put(new) and len(side.get_exact(new).keys) == 10)


@resp
def test_a_dead_server_costs_nothing_once_it_is_known_to_be_dead(
    place: Place, server: RedisServer, start_side
):
    side = start_side(place.adapter)
    side.put(keys(10))
    server.kill()
    ask_until_left_alone(side)
    side.tier.take_stats()
    assert side.get(keys(10)).seconds < 0.05
    assert not side.finished[side.put(keys(10))].complete
    assert side.tier.take_stats() == {("store", "dropped"): 10}
    server.start()
    assert_recovers(side)


@resp
def test_a_server_that_is_down_at_the_start(place: Place, server: RedisServer, start_side):
    server.kill()
    lmcache.parse(place.adapter)  # Imports the adapter's module, of which the tier has no idea.
    started = time.monotonic()
    side = start_side(place.adapter)
    assert time.monotonic() - started < side.limits.timeout_s + SLACK_S
    assert not side.tier.usable
    server.start()
    assert_recovers(side)


@resp
def test_a_hanging_server(place: Place, server: RedisServer, start_side):
    side = start_side(place.adapter)
    side.put(keys(10))
    server.stop()
    ask_until_left_alone(side)
    server.resume()
    assert_recovers(side)
    assert len(side.get_exact(keys(10)).keys) == 10


@resp
def test_nothing_is_written_to_a_slot_after_its_load_has_failed(
    place: Place, server: RedisServer, start_side
):
    """The server wakes up right when a load has failed; its late answer goes nowhere."""
    side = start_side(place.adapter, load_deadline_s=0.2)
    side.put(keys(30))
    for _ in range(3):
        hits: list[bytes] = []
        while len(hits) < 30:
            side.put(keys(30))
            request, hits, _ = side.find(keys(30))
        server.stop()
        side.tier.load(1000, request, hits, [side.slot(i) for i in range(30)])
        finished = side.step_until(1000)
        side.finished.clear()
        for i in range(30):
            side.slot(i)[:] = b"\x11" * SLOT
        server.resume()
        time.sleep(0.1)
        assert finished.loaded == ()
        assert bytes(side.memory[: 30 * SLOT]) == b"\x11" * (30 * SLOT)
    assert_recovers(side)


@resp
def test_a_server_that_is_killed_while_it_is_used(place: Place, server: RedisServer, start_side):
    side = start_side(place.adapter)
    for round_ in range(4):
        side.put(keys(60))
        killer = threading.Timer(0.004 * round_, server.kill)
        killer.start()
        loaded = side.get_exact(keys(60))
        assert_in_time(side, loaded.seconds)
        killer.join()
        server.start()
        assert_recovers(side)


@resp
def test_a_full_server(place: Place, server: RedisServer, start_side):
    """LMCache's RESP client loses its place in the conversation when it is refused something."""
    side = start_side(place.adapter)
    side.put(keys(10))
    server.client.config_set("maxmemory", 1)
    assert not side.finished[side.put(keys(10, "more"))].complete
    for _ in range(5):
        assert_in_time(side, side.get_exact(keys(10)).seconds)
    server.client.config_set("maxmemory", 0)
    assert_recovers(side)
    assert len(side.get_exact(keys(10)).keys) == 10


@everywhere
def test_entries_that_vanish_between_lookup_and_load(place: Place, start_side):
    side = start_side(place.adapter)
    side.put(keys(20))
    request, hits, _ = side.find(keys(20))
    for name in place.values():
        if any(key.hex() in name for key in keys(20)[5:]):
            place.remove(name)
    side.tier.load(77, request, hits, [side.slot(i) for i in range(20)])
    assert [key for key, _ in side.step_until(77).loaded] == keys(20)[:5]
    assert side.tier.take_stats()["load", "gone"] == 15
    # What is only half there is written again.
    side.put(keys(20))
    assert len(side.get_exact(keys(20)).keys) == 20
