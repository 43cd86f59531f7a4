"""What is wrong with a Redis is never more than a miss, within the deadline."""

import random
import threading
import time

import pytest

from tests.redis.engine_side import (
    SECRET,
    SLACK_S,
    SLOT,
    EngineSide,
    ask_until_left_alone,
    assert_in_time,
    keys,
)
from tests.redis.servers import Proxy, entries, wait_until
from vllm_cachescope.connectors.redis.store import FRONT_BYTES


def assert_recovers(side: EngineSide) -> None:
    wait_until(lambda: side.tier.usable)
    # What is slow is tried again by a request.
    wait_until(lambda: side.get(keys(1)) and side.tier.health()["readable"])
    side.put(keys(10, "recovered"))
    assert len(side.get_exact(keys(10, "recovered")).keys) == 10


def test_a_dead_server_costs_nothing_once_it_is_known_to_be_dead(server, start_engine_side):
    side = start_engine_side(server.url)
    side.put(keys(10))
    server.kill()
    ask_until_left_alone(side)
    side.tier.take_stats()
    assert side.get(keys(10)).seconds < 0.01
    job = side.put(keys(10))
    assert not side.finished[job].complete
    # Nothing is asked any more, and what cannot be stored is counted.
    assert side.tier.take_stats() == {("store", "dropped"): 10}
    assert "refused" in side.tier.health()["reason"]


def test_a_server_that_comes_back_is_used_again_and_empty(server, start_engine_side):
    side = start_engine_side(server.url)
    side.put(keys(10))
    server.kill()
    ask_until_left_alone(side)
    server.start()
    wait_until(lambda: side.tier.usable)
    assert side.get(keys(10)).keys == {}
    assert_recovers(side)


def test_a_restart_between_two_requests_is_not_even_a_failure(server, start_engine_side):
    side = start_engine_side(server.url)
    side.put(keys(10))
    side.get(keys(10))
    server.kill()
    server.start()
    assert side.get(keys(10)).keys == {}
    side.put(keys(10))
    assert len(side.get_exact(keys(10)).keys) == 10
    assert side.tier.usable


def test_a_server_that_is_down_at_the_start(server, start_engine_side):
    server.kill()
    started = time.monotonic()
    side = start_engine_side(server.url)
    assert time.monotonic() - started < side.limits.timeout_s + SLACK_S
    assert not side.tier.usable
    server.start()
    assert_recovers(side)


def test_a_hanging_server(server, start_engine_side):
    side = start_engine_side(server.url)
    side.put(keys(10))
    server.stop()
    ask_until_left_alone(side)
    server.resume()
    assert_recovers(side)
    # What it was asked to do while it hung did no harm.
    assert len(side.get_exact(keys(10)).keys) == 10


def test_a_server_that_hangs_after_the_lookup(server, start_engine_side):
    side = start_engine_side(server.url)
    side.put(keys(10))
    started = time.monotonic()
    request, hits, _ = side.find(keys(10))
    server.stop()
    side.tier.load(77, request, hits, [side.slot(i) for i in range(10)])
    finished = side.step_until(77)
    assert_in_time(side, time.monotonic() - started)
    assert finished.loaded == ()
    server.resume()


def find_all(side, wanted):
    """Ask for keys until all are found, and store them again where one was refused meanwhile;
    return the request that found them, and the keys."""
    for _ in range(100):
        request, hits, _ = side.find(wanted)
        if len(hits) == len(wanted):
            return request, hits
        time.sleep(0.1)
        side.put(wanted)
    raise AssertionError(f"only {len(hits)} of {len(wanted)} keys are found")


def test_nothing_is_written_to_a_slot_after_its_load_has_failed(server, start_engine_side):
    """The server wakes up right when a load has failed; its late answer goes nowhere."""
    side = start_engine_side(server.url, load_deadline_s=0.1)
    side.put(keys(30))
    for _ in range(5):
        request, hits = find_all(side, keys(30))
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


def test_values_that_vanish_between_lookup_and_load(server, start_engine_side):
    side = start_engine_side(server.url)
    side.put(keys(20))
    request, hits, _ = side.find(keys(20))
    for key in keys(20)[5:]:
        server.client.delete(side.name(key))
    side.tier.load(77, request, hits, [side.slot(i) for i in range(20)])
    assert [key for key, _ in side.step_until(77).loaded] == keys(20)[:5]
    assert side.tier.take_stats()["load", "gone"] == 15


def test_flushall_while_it_is_loading(server, start_engine_side):
    side = start_engine_side(server.url)
    for round_ in range(5):
        side.put(keys(60))
        flusher = threading.Timer(0.001 * round_, server.client.flushall)
        flusher.start()
        side.get_exact(keys(60))
        flusher.join()
    assert side.tier.usable


def test_every_flipped_bit_is_noticed(server, start_engine_side):
    """1,000 damaged values: one bit somewhere in each, the header included."""
    side = start_engine_side(server.url, load_deadline_s=30.0, timeout_s=30.0)
    chance = random.Random(3)
    noticed = 0
    for start in range(0, 1000, 50):
        damaged = keys(50, f"damaged {start}")
        side.put(damaged)
        pipeline = server.client.pipeline()
        for i, key in enumerate(damaged):
            # A third of them in the header, which is a tiny part of the value.
            bits = FRONT_BYTES * 8 if i % 3 == 0 else (FRONT_BYTES + SLOT) * 8
            at = chance.randrange(bits)
            pipeline.execute_command("SETBIT", side.name(key), at, 1)
            pipeline.execute_command("BITFIELD", side.name(key), "GET", "u1", at)
        replies = pipeline.execute_command("PING") and pipeline.execute()
        # SETBIT tells what was there; where it was a one already, make it a zero.
        for i, key in enumerate(damaged):
            if replies[2 * i] == 1:
                position = chance.randrange(FRONT_BYTES * 8)
                old = server.client.execute_command("GETBIT", side.name(key), position)
                server.client.execute_command("SETBIT", side.name(key), position, 1 - old)
        assert side.get(damaged).keys == {}
        noticed += side.tier.take_stats()["load", "damaged"]
        # They are gone, so that whole ones can take their place.
        wait_until(lambda: not entries(server))
    assert noticed == 1000
    assert side.tier.usable


@pytest.mark.parametrize(
    "tamper",
    [
        lambda client, name: client.set(name, client.get(name)[:-1], ex=100),
        lambda client, name: client.set(name, client.get(name) + b"x", ex=100),
        lambda client, name: client.set(name, b"", ex=100),
        lambda client, name: client.set(name, b"CSKV", ex=100),
    ],
    ids=["shorter", "longer", "empty", "header only"],
)
def test_values_that_are_not_ours_are_misses_and_deleted(server, start_engine_side, tamper):
    side = start_engine_side(server.url)
    name = side.name(keys(1)[0])
    side.put(keys(2))
    tamper(server.client, name)
    assert set(side.get_exact(keys(2)).keys) == {keys(2)[1]}
    assert side.tier.take_stats()["load", "damaged"] == 1
    wait_until(lambda: not server.client.exists(name))
    side.put(keys(2))
    assert len(side.get_exact(keys(2)).keys) == 2


def test_a_full_server_is_read_and_not_written(server, start_engine_side, caplog):
    side = start_engine_side(server.url, first_probe_s=0.3)
    side.put(keys(10))
    server.client.config_set("maxmemory-policy", "noeviction")
    server.client.config_set("maxmemory", 1)
    job = side.put(keys(10, "more"))
    assert not side.finished[job].complete
    assert side.tier.take_stats()["store", "refused"] > 0
    assert "OOM" in caplog.text
    assert not side.tier.health()["writable"]
    assert len(side.get_exact(keys(10)).keys) == 10
    # For a while nothing is sent to it in vain.
    side.put(keys(10, "more"))
    assert side.tier.take_stats()["store", "dropped"] == 10
    server.client.config_set("maxmemory", 0)
    wait_until(lambda: side.finished[side.put(keys(10, "more"))].complete)
    assert side.tier.health()["writable"]


def test_a_user_who_may_not_read(server, start_engine_side):
    server.client.execute_command("ACL SETUSER kv on >pw ~* +@all -get")
    side = start_engine_side(f"redis://kv:pw@127.0.0.1:{server.port}")
    side.put(keys(5))
    ask_until_left_alone(side)
    assert "'get'" in side.tier.health()["reason"]
    assert side.tier.health()["writable"]


def test_rights_that_are_taken_away_while_it_runs(server, start_engine_side):
    server.client.execute_command("ACL SETUSER kv on >pw ~* +@all")
    side = start_engine_side(f"redis://kv:pw@127.0.0.1:{server.port}")
    side.put(keys(5))
    server.client.execute_command("ACL SETUSER kv resetkeys")
    for _ in range(side.limits.failures):
        assert_in_time(side, side.get(keys(5)).seconds)
    assert not side.tier.usable
    assert "NOPERM" in side.tier.health()["reason"]
    server.client.execute_command("ACL SETUSER kv ~*")
    assert_recovers(side)


def test_a_wrong_password_is_said_at_the_start(server, start_engine_side, caplog):
    server.client.execute_command("ACL SETUSER kv on >pw ~* +@all")
    side = start_engine_side(f"redis://kv:wrong@127.0.0.1:{server.port}")
    assert not side.tier.usable
    assert "invalid username-password" in caplog.text
    assert "wrong" not in caplog.text.replace("WRONGPASS", "")


def test_a_server_of_another_kind(start_engine_side):
    import socket

    listener = socket.create_server(("127.0.0.1", 0))

    def greet() -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            sock.sendall(b"SSH-2.0-OpenSSH_9\r\n" * 100)

    threading.Thread(target=greet, daemon=True).start()
    side = start_engine_side(f"redis://127.0.0.1:{listener.getsockname()[1]}")
    assert not side.tier.usable
    assert side.get(keys(3)).seconds < 0.1
    listener.close()


def test_a_connection_that_drips(server, start_engine_side):
    proxy = Proxy(server.port)
    side = start_engine_side(proxy.url)
    side.put(keys(20))
    proxy.chunk, proxy.pause_s = 20_000, 0.01
    for _ in range(2):
        loaded = side.get_exact(keys(20))
        assert_in_time(side, loaded.seconds)
        # What came in time is used, from the first block on.
        assert keys(20)[0] in loaded.keys
    proxy.chunk = None
    wait_until(lambda: len(side.get_exact(keys(20)).keys) == 20)
    proxy.close()


def test_while_blocks_come_a_request_waits_as_long_as_computing_them_is_worth(
    server, start_engine_side
):
    proxy = Proxy(server.port)
    side = start_engine_side(proxy.url, load_deadline_s=0.6)
    side.put(keys(20))
    side.get_exact(keys(20))  # both connections are there
    proxy.chunk = 20_000
    over = threading.Event()

    def blocks_come() -> None:
        """Have one come each tenth of a second."""
        while not over.wait(0.1):
            if proxy.most is not None:
                proxy.most += SLOT

    proxy.most = proxy.passed + 12 * SLOT
    assert 0 < len(side.get_exact(keys(20)).keys) < 20
    proxy.most = proxy.passed + 12 * SLOT
    coming = threading.Thread(target=blocks_come)
    coming.start()
    worth = side.get(keys(20), worth_s=60.0)
    assert len(worth.keys) == 20
    assert worth.seconds > side.limits.load_deadline_s
    # A quarter of the time that computing them would take is over before all have come.
    proxy.most = proxy.passed + 6 * SLOT
    little = side.get(keys(20), worth_s=3.2)
    assert little.seconds > 0.8
    assert_in_time(side, little.seconds - 0.8 + side.limits.load_deadline_s)
    assert 0 < len(little.keys) < 20
    over.set()
    coming.join()
    proxy.most = None
    proxy.close()


def test_a_server_that_hangs_in_the_middle_of_a_load_that_is_worth_much(server, start_engine_side):
    proxy = Proxy(server.port)
    side = start_engine_side(proxy.url)
    side.put(keys(60))
    proxy.chunk, proxy.pause_s = 20_000, 0.002
    threading.Timer(0.2, server.stop).start()
    loaded = side.get(keys(60), worth_s=3600.0)
    assert 0 < len(loaded.keys) < 60
    # What is on its way through the proxy still comes; then nothing does.
    assert loaded.seconds < 0.2 + 2.0 + side.limits.load_deadline_s + SLACK_S
    server.resume()
    proxy.close()


def test_a_connection_that_drips_single_bytes(server, start_engine_side):
    proxy = Proxy(server.port)
    side = start_engine_side(proxy.url)
    side.put(keys(5))
    proxy.chunk, proxy.pause_s = 1, 0.05
    ask_until_left_alone(side)
    proxy.chunk = None
    assert_recovers(side)
    proxy.close()


def test_a_proxy_that_cuts_in_the_middle_of_a_value(server, start_engine_side):
    proxy = Proxy(server.port)
    side = start_engine_side(proxy.url)
    side.put(keys(20))
    chance = random.Random(1)
    for _ in range(10):
        wait_until(lambda: side.tier.usable)
        proxy.cut_after = chance.randrange(8 * SLOT)
        assert_in_time(side, side.get_exact(keys(20)).seconds)
        proxy.cut_after = None
    assert_recovers(side)
    proxy.close()


def test_cut_while_it_is_storing(server, start_engine_side):
    side = start_engine_side(server.url)
    for _ in range(5):
        wait_until(lambda: side.tier.usable)
        job = side.put(keys(60), wait=False)
        server.client.client_kill_filter(_type="normal", skipme=True)
        side.step_until(job)
    wait_until(lambda: side.tier.usable)
    side.get_exact(keys(60))
    assert_recovers(side)


def test_faults_at_random(start_server, start_engine_side):
    """Two engines keep storing and loading while their server is mistreated: what they load is
    what was stored, in time, and nothing is left over."""
    server = start_server()
    proxy = Proxy(server.port)
    sides = [start_engine_side(url) for url in (server.url, proxy.url)]
    threads = threading.active_count()
    chance = random.Random(7)
    universe = keys(40)
    loaded = 0
    for step in range(80):
        fault = chance.choice(("none", "none", "none", "restart", "hang", "flush", "cut", "kick"))
        if fault == "restart":
            server.kill()
            server.start()
        elif fault == "hang":
            server.stop()
            threading.Timer(chance.uniform(0.01, 0.2), server.resume).start()
        elif fault == "flush":
            server.client.flushall()
        elif fault == "kick":
            server.client.client_kill_filter(_type="normal", skipme=True)
        proxy.cut_after = chance.randrange(10 * SLOT) if fault == "cut" else None
        side = sides[step % 2]
        some = chance.sample(universe, 10)
        if chance.random() < 0.5:
            side.put(some)
        else:
            got = side.get_exact(some)
            loaded += len(got.keys)
            assert_in_time(side, got.seconds)
    assert loaded > 0
    proxy.cut_after = None
    for side in sides:
        assert_recovers(side)
        assert side.tier.health()["loading_bytes"] == side.tier.health()["storing_bytes"] == 0
    # The proxy's own threads come and go with its connections.
    wait_until(lambda: threading.active_count() <= threads + 2 * 5)
    wait_until(lambda: len(server.client.client_list()) <= 2 * 5 + 1)
    proxy.close()


def test_what_is_said_of_a_server_does_not_tell_its_password(server, start_engine_side):
    server.client.execute_command("ACL SETUSER kv on >topsecret ~* +@all")
    side = start_engine_side(f"redis://kv:topsecret@127.0.0.1:{server.port}")
    assert "topsecret" not in str(side.tier.health())
    assert SECRET.decode() not in str(server.client.get(side.keyspace.handshake))
