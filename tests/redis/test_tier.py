"""The Redis tier as one engine and several see it, while nothing is wrong."""

import threading
import time

import pytest

from tests.redis.engine_side import SLOT, content, keys
from tests.redis.servers import beside_engines, entries, wait_until
from vllm_cachescope.connectors.redis.store import FRONT_BYTES
from vllm_cachescope.tenancy.owner_tags import NOBODY
from vllm_cachescope.tiers.inventory import Inventory
from vllm_cachescope.tiers.keyspace import OwnerNames, secret_digest


def test_another_engine_reads_what_one_has_stored(server, start_engine_side):
    a, b = start_engine_side(server.url), start_engine_side(server.url)
    stored = keys(40)
    job = a.put(stored, ttl_s=300)
    assert a.finished[job].complete
    assert a.finished[job].nbytes == 40 * SLOT

    loaded = b.get_exact(stored)
    assert loaded.keys == dict.fromkeys(stored, 300)
    assert b.get_exact(keys(3, "never stored")).keys == {}


def test_a_hit_in_the_middle_of_misses(server, start_engine_side):
    side = start_engine_side(server.url)
    some = keys(10)
    side.put(some[2:5])
    assert set(side.get_exact(some).keys) == set(some[2:5])


@pytest.mark.parametrize("difference", [{"identity": "another model"}, {"secret": b"x" * 20}])
def test_what_is_not_ours_is_not_found(server, start_engine_side, difference):
    a = start_engine_side(server.url)
    a.put(keys(3))
    b = start_engine_side(server.url, **difference)
    assert b.get(keys(3)).keys == {}


def test_values_expire_with_their_lifetime(server, start_engine_side):
    side = start_engine_side(server.url)
    short, long = keys(4)[:2], keys(4)[2:]
    side.put(short, ttl_s=300)
    side.put(long, ttl_s=3600)
    left = [server.client.pttl(side.name(key)) / 1000 for key in short + long]
    assert all(290 < seconds <= 300 for seconds in left[:2])
    assert all(3590 < seconds <= 3600 for seconds in left[2:])


def test_an_expired_value_is_a_miss(server, start_engine_side):
    side = start_engine_side(server.url)
    side.put(keys(2))
    for key in keys(2):
        server.client.pexpire(side.name(key), 1)
    wait_until(lambda: not server.client.exists(side.name(keys(2)[0])))
    assert side.get(keys(2)).keys == {}
    wait_until(lambda: not entries(server))


def test_a_use_lets_a_value_live_on_without_writing_it_again(server, start_engine_side):
    a, b = start_engine_side(server.url), start_engine_side(server.url)
    key = keys(1)[0]
    a.put([key], ttl_s=300)
    server.client.pexpire(a.name(key), 60_000)
    written = server.client.info()["total_net_input_bytes"]
    b.use([key])
    wait_until(lambda: server.client.pttl(a.name(key)) > 290_000)
    assert server.client.info()["total_net_input_bytes"] - written < SLOT
    # A use with a shorter lifetime takes nothing away.
    a.use([key], 10)
    a.use([key], 301)
    wait_until(lambda: server.client.pttl(a.name(key)) > 300_000)


def test_a_use_of_what_is_not_there_leaves_nothing_behind(server, start_engine_side):
    side = start_engine_side(server.url)
    side.use(keys(5))
    side.put(keys(1, "later"))
    assert entries(server) == {side.name(keys(1, "later")[0])}
    index = OwnerNames(side.keyspace.namespace.encode())
    assert server.client.zcard(index.entries(NOBODY[:8], NOBODY[8:])) == 1


def test_what_is_there_already_is_not_sent_again(server, start_engine_side):
    a, b = start_engine_side(server.url), start_engine_side(server.url)
    a.put(keys(20))
    for key in keys(20):
        server.client.pexpire(a.name(key), 60_000)
    received = server.client.info()["total_net_input_bytes"]
    b.put(keys(20), ttl_s=600)
    assert server.client.info()["total_net_input_bytes"] - received < SLOT
    assert b.tier.take_stats()["store", "present"] == 20
    assert all(server.client.pttl(a.name(key)) > 590_000 for key in keys(20))


def test_routers_are_told_what_an_engine_stored_until_it_hears_that_it_is_gone(
    server, start_engine_side
):
    inventories = [Inventory(time.monotonic) for _ in range(2)]
    a, b = (start_engine_side(server.url, inventory=inventory) for inventory in inventories)
    for side in (a, b):
        side.put(keys(4))
    assert a.tier.take_changes() == [(keys(4), False)]
    assert b.tier.take_changes() == []
    server.client.delete(a.name(keys(4)[1]))
    damaged = a.name(keys(4)[2])
    server.client.setrange(damaged, FRONT_BYTES, b"damaged")
    assert set(a.get(keys(4)).keys) == {keys(4)[0], keys(4)[3]}
    assert [change for change in a.tier.take_changes() if change.removed] == [
        ([keys(4)[1]], True),
        ([keys(4)[2]], True),
    ]
    assert a.tier.held() == [keys(4)[0], keys(4)[3]]


def test_two_engines_that_store_the_same_at_once(server, start_engine_side):
    sides = [start_engine_side(server.url) for _ in range(2)]
    for _ in range(5):
        server.client.flushall()
        jobs = [side.put(keys(30), wait=False) for side in sides]
        assert all(s.step_until(j).complete for s, j in zip(sides, jobs, strict=True))
        assert len(sides[0].get_exact(keys(30)).keys) == 30


def test_a_value_is_a_header_and_the_block(server, start_engine_side):
    side = start_engine_side(server.url)
    key = keys(1)[0]
    side.put([key])
    value = server.client.get(side.name(key))
    assert len(value) == FRONT_BYTES + SLOT
    assert value[:4] == b"CSKV"
    assert value[FRONT_BYTES:] == content(key)


def test_over_a_unix_socket(server, start_engine_side):
    side = start_engine_side(f"unix://{server.socket}")
    side.put(keys(5))
    assert len(side.get_exact(keys(5)).keys) == 5


def test_with_a_user_that_may_do_no_more_than_it_must(server, start_engine_side):
    rights = "~cachescope:* +set +get +exists +pexpire +pttl +unlink +eval +setrange"
    server.client.execute_command(f"ACL SETUSER kv on >pw {rights}")
    side = start_engine_side(f"redis://kv:pw@127.0.0.1:{server.port}")
    side.put(keys(5))
    assert len(side.get_exact(keys(5)).keys) == 5


def test_a_full_queue_drops_what_does_not_fit(server, start_engine_side):
    side = start_engine_side(server.url, inflight_bytes=8 * SLOT)
    job = side.put(keys(12))
    assert not side.finished[job].complete
    assert side.tier.take_stats()["store", "dropped"] == 4
    assert len(entries(server)) == 8


def test_more_hits_than_may_be_under_way_are_misses(server, start_engine_side):
    side = start_engine_side(server.url)
    side.put(keys(20))
    small = start_engine_side(server.url, inflight_bytes=8 * SLOT)
    assert list(small.get_exact(keys(20)).keys) == keys(20)[:8]
    assert small.tier.take_stats()["load", "dropped"] == 12


def test_answers_that_come_in_the_middle_of_the_questions(server, start_engine_side):
    """A request learns all answers in one step, so that it loads its prompt from the start."""
    side = start_engine_side(server.url)
    side.put(keys(10))
    for key in keys(10):
        assert side.tier.lookup("r", key).value == "retry"
    side.tier.flush()
    assert side.tier.lookup("r", keys(10)[0]).value == "retry"
    wait_until(lambda: side.tier.take_stats().get(("lookup", "hit")))
    assert {side.tier.lookup("r", key).value for key in keys(10)} == {"retry"}
    side.tier.flush()
    assert {side.tier.lookup("r", key).value for key in keys(10)} == {"hit"}


def test_one_request_loads_once(server, start_engine_side):
    side = start_engine_side(server.url)
    side.put(keys(2))
    request, hits, _ = side.find(keys(2))
    side.tier.load(99, request, hits[:1], [side.slot(0)])
    side.step_until(99)
    assert side.tier.lookup(request, keys(2)[1]).value == "miss"
    side.tier.end_request(request)
    assert len(side.get_exact(keys(2)).keys) == 2


def test_drain_gives_up_what_waits_and_ends_what_runs(server, start_engine_side):
    side = start_engine_side(server.url)
    side.put(keys(60))
    request, hits, _ = side.find(keys(60))
    jobs = [side.put(keys(60, f"{i}"), wait=False) for i in range(3)]
    side.tier.load(50, request, hits, [side.slot(i) for i in range(len(hits))])
    side.tier.drain()
    over = {f.job_id for f in side.tier.finished()} | set(side.finished)
    assert {*jobs, 50} <= over
    assert side.tier.health()["loading_bytes"] == side.tier.health()["storing_bytes"] == 0


def test_closing_leaves_no_threads_and_no_connections(server, start_engine_side):
    before = set(threading.enumerate())
    clients = len(server.client.client_list())
    side = start_engine_side(server.url)
    side.put(keys(10))
    side.get(keys(10))
    assert len(set(threading.enumerate()) - before) == 6
    side.close()
    assert set(threading.enumerate()) <= before
    wait_until(lambda: len(server.client.client_list()) <= clients)


def test_the_secret_of_another_replica_is_told_apart(server, start_engine_side, caplog):
    a = start_engine_side(server.url)
    b = start_engine_side(server.url, secret=b"another secret of the tests")
    assert a.tier.usable
    assert not b.tier.usable
    assert "another secret" in b.tier.health()["reason"]
    assert "another secret" in caplog.text
    b.put(keys(3))
    assert set(server.client.keys()) == beside_engines(server)
    # Another model is none of its business.
    assert start_engine_side(server.url, identity="m2", secret=b"y" * 20).tier.usable
    # Once the last engine with the other secret has gone, its digest expires.
    server.client.delete(a.keyspace.handshake)
    wait_until(lambda: b.tier.usable)
    assert server.client.get(b.keyspace.handshake) == secret_digest(b"another secret of the tests")


def test_the_digest_of_the_secret_goes_with_the_last_engine(server, start_engine_side):
    side = start_engine_side(server.url)
    assert 0 < server.client.pttl(side.keyspace.handshake) <= 60_000


def test_the_scheduler_is_never_kept_waiting(server, start_engine_side):
    """Every call returns long before any deadline while the server hangs."""
    side = start_engine_side(server.url, load_deadline_s=20.0, timeout_s=20.0)
    side.put(keys(10))
    server.stop()
    started = time.monotonic()
    for i in range(50):
        side.tier.lookup(f"x{i}", keys(1)[0])
        side.tier.flush()
        side.use(keys(10))
        side.put(keys(2, f"{i}"), wait=False)
        side.tier.finished()
    assert time.monotonic() - started < 10
    server.resume()
