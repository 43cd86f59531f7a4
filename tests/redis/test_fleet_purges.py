"""A purge on one of two engines that share a Redis: the other one carries it out as well."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.engine.engine import BLOCK, OWNERS, draw_tokens
from tests.engine.engine import SECRET as ENGINES_SECRET
from tests.redis.engine_side import SECRET, EngineSide
from tests.redis.pair import Pair, ask, running_pair
from tests.redis.servers import Proxy, wait_until
from vllm_cachescope.connectors.redis import purge_log
from vllm_cachescope.tiers.fleet_purges import (
    CONFIRM_S,
    FOLLOW_S,
    LATE_S,
    Announcement,
    Errand,
    FleetPurges,
)
from vllm_cachescope.tiers.jobs import Purge
from vllm_cachescope.tiers.keyspace import PurgeLogNames, secret_digest
from vllm_cachescope.tiers.purge_log import MAX_ENTRIES
from vllm_cachescope.tiers.purge_notices import PurgeNotice

ACME = OWNERS.prefix("acme")
BLOCKS = 6


def log_names() -> PurgeLogNames:
    return PurgeLogNames(secret_digest(SECRET))


def announced(side: EngineSide, notice: PurgeNotice) -> Announcement:
    """Announce a purge and return what became of it."""
    assert side.tier.fleet is not None
    announcement = side.tier.fleet.announce(notice)
    wait_until(lambda: announcement.over)
    return announcement


def taken(side: EngineSide, purges: list[Purge] | None = None) -> list[Errand]:
    """Take what an engine is to carry out, and say that it is done but for ``purges``."""
    assert side.tier.fleet is not None
    errands = list(side.tier.fleet.take())
    for errand in errands:
        side.tier.fleet.carried_out(errand, purges or [])
    return errands


def heard(side: EngineSide, purges: list[Purge] | None = None) -> list[PurgeNotice]:
    """Do `taken`, and return what the engine has heard of."""
    return [errand.notice for errand in taken(side, purges)]


def heeding(*sides: EngineSide) -> Callable[[], list[PurgeNotice]]:
    """Have engines carry out what they hear of; what is returned ends that and returns it all."""
    notices: list[PurgeNotice] = []
    over = threading.Event()

    def run() -> None:
        while not over.wait(0.005):
            for side in sides:
                notices.extend(heard(side))

    thread = threading.Thread(target=run)
    thread.start()

    def end() -> list[PurgeNotice]:
        over.set()
        thread.join()
        return notices

    return end


def follows(side: EngineSide) -> FleetPurges:
    """Return the purges of an engine once it has read the log."""
    fleet = side.tier.fleet
    assert fleet is not None
    wait_until(lambda: fleet.follows)
    return fleet


def test_others_confirm_by_name(server, start_engine_side):
    sides = [start_engine_side(server.url, name=name) for name in ("a", "b", "c")]
    for side in sides:
        follows(side)
    end = heeding(*sides[1:])
    notice = PurgeNotice("p", ACME, "acme", "s1")
    done = announced(sides[0], notice)
    assert end() == [notice, notice]
    assert (done.confirmed, done.missing) == (["b", "c"], {})
    # Nobody is told of it twice, and who has announced it is not told at all.
    time.sleep(2 * FOLLOW_S)
    assert [heard(side) for side in sides] == [[], [], []]


def test_nothing_is_confirmed_before_the_store_is_purged_as_well(server, start_engine_side):
    a, b = (start_engine_side(server.url, name=name) for name in ("a", "b"))
    follows(a), follows(b)
    announcement = a.tier.fleet.announce(PurgeNotice("p", ACME))
    under_way = Purge(ACME)
    wait_until(lambda: heard(b, [under_way]))
    time.sleep(3 * FOLLOW_S)
    assert not announcement.over
    under_way.end(None)
    wait_until(lambda: announcement.over)
    assert announcement.confirmed == ["b"]


def test_who_is_cut_off_is_named_and_learns_it_later(server, start_engine_side):
    proxy = Proxy(server.port)
    a, b = start_engine_side(server.url, name="a"), start_engine_side(proxy.url, name="b")
    follows(a), follows(b)
    proxy.cut_after = 0
    began = time.monotonic()
    done = announced(a, PurgeNotice("p", ACME))
    assert time.monotonic() - began < CONFIRM_S + 1
    assert done.confirmed == [] and "within 5 s" in done.missing["b"]
    assert heard(b) == []
    proxy.cut_after = None
    wait_until(lambda: [notice.purge_id for notice in heard(b)] == ["p"])


def test_a_purge_without_the_store_says_so(server, start_engine_side):
    a = start_engine_side(server.url, name="a")
    follows(a)
    server.kill()
    done = announced(a, PurgeNotice("p", ACME))
    assert done.confirmed == [] and "could not be told" in done.missing["other replicas"]


def test_who_starts_later_has_nothing_to_do(server, start_engine_side):
    a = start_engine_side(server.url, name="a")
    announced(a, PurgeNotice("p", ACME))
    b = start_engine_side(server.url, name="b")
    follows(b)
    time.sleep(2 * FOLLOW_S)
    assert heard(b) == []


def test_who_was_away_for_too_long_drops_all_it_has(server, start_engine_side, monkeypatch):
    a, b = (start_engine_side(server.url, name=name) for name in ("a", "b"))
    follows(a), follows(b)
    monkeypatch.setattr(purge_log, "RETENTION_US", 0)
    wait_until(lambda: any(errand.at_home and not errand.notice.prefix for errand in taken(b)))


def test_who_missed_notices_that_went_early_drops_all_it_has(server, start_engine_side):
    """The log holds so many, and not more."""
    proxy = Proxy(server.port)
    a, b = start_engine_side(server.url, name="a"), start_engine_side(proxy.url, name="b")
    follows(a), follows(b)
    proxy.cut_after = 0
    client, names = server.client, log_names()
    seconds, micros = client.time()
    client.zadd(names.log, {f"{i}": seconds * 10**6 + micros + i for i in range(MAX_ENTRIES)})
    time.sleep(MAX_ENTRIES / 1e6)
    announced(a, PurgeNotice("p", ACME))
    assert client.zcard(names.log) == MAX_ENTRIES
    assert not any(errand.at_home for errand in taken(a))
    proxy.cut_after = None
    wait_until(lambda: any(errand.at_home for errand in taken(b)))


@pytest.mark.parametrize("secret", [SECRET, b"another secret of the tests"])
def test_only_those_with_the_secret_are_heard(server, start_engine_side, secret):
    """Somebody who may write to the Redis can neither have an engine purge nor confirm for it."""
    client, names = server.client, log_names()
    a = start_engine_side(server.url, name="a")
    follows(a)
    (claim,) = client.hvals(names.followers)
    client.hset(names.followers, b"made up", claim)
    client.zadd(names.log, {b"not sealed by anyone": time.time() * 1e6})
    b = start_engine_side(server.url, name="b", secret=secret, identity="another model")
    follows(b)
    end = heeding(a, b)
    done = announced(a, PurgeNotice("p", ACME))
    notices = end()
    if secret == SECRET:
        assert [notice.purge_id for notice in notices] == ["p"] and done.confirmed == ["b"]
    else:
        assert notices == [] and done.confirmed == []
    assert done.missing == {}


def test_a_full_redis_takes_purges(server, start_engine_side):
    a, b = (start_engine_side(server.url, name=name) for name in ("a", "b"))
    follows(a), follows(b)
    server.client.config_set("maxmemory-policy", "noeviction")
    server.client.config_set("maxmemory", 1)
    end = heeding(b)
    done = announced(a, PurgeNotice("p", ACME))
    end()
    assert done.confirmed == ["b"]


def test_a_cluster_carries_purges_as_well(nodes, start_engine_side):
    url = f"redis+cluster://127.0.0.1:{nodes[0].port}"
    a, b = (start_engine_side(url, name=name) for name in ("a", "b"))
    follows(a), follows(b)
    end = heeding(b)
    done = announced(a, PurgeNotice("p", ACME))
    assert [notice.purge_id for notice in end()] == ["p"]
    assert done.confirmed == ["b"]


@pytest.fixture(scope="module")
def engines(tmp_path_factory) -> Iterator[Pair]:
    with running_pair(tmp_path_factory.mktemp("redis"), load_deadline="2s", timeout="2s") as pair:
        yield pair


@pytest.fixture
def pair(engines: Pair) -> Pair:
    engines.fresh()
    # That took the list of followers, too.
    names = PurgeLogNames(secret_digest(ENGINES_SECRET.encode()))
    wait_until(lambda: engines.server.client.hlen(names.followers) == 2)
    return engines


def shared(pair: Pair, seed: int) -> tuple[list[int], list[int]]:
    """Have both engines hold a prompt; return it with the model's answer."""
    tokens = draw_tokens(random.Random(seed), BLOCKS * BLOCK + 7)
    (answer,) = pair.a.run(ask(tokens))
    wait_until(lambda: len(pair.names()) >= BLOCKS)
    pair.b.run(ask(tokens))
    return tokens, answer.tokens


@pytest.mark.engine
def test_a_purge_empties_the_devices_and_memories_of_all_engines(pair):
    tokens, expected = shared(pair, 1)
    zetas = draw_tokens(random.Random(2), 2 * BLOCK + 1)
    pair.b.run(ask(zetas, org="zeta"))
    pair.a.call("command_purge", ACME, "p1", "name:acme", None)
    answer = pair.purged(pair.a, "p1")
    assert answer["confirmed"] == ["the other one"] and answer["missing"] == {}
    # API processes forget what they know of it, once.
    heard_of = pair.b.call("command_heed", "b", 0)
    assert [purge[1:] for purge in heard_of][-1] == ("p1", "name:acme", None)
    assert pair.b.call("command_heed", "b", heard_of[-1][0]) == []
    assert len(pair.names()) == 2
    (again,) = pair.b.run(ask(tokens))
    assert (again.read, again.tokens) == (0, expected)
    (miss,) = again.report.misses
    assert miss.detail == "it was purged"
    (other,) = pair.b.run(ask(zetas, org="zeta"))
    assert other.outcome("read_device") == 2 * BLOCK


@pytest.mark.engine
def test_a_prompt_that_runs_elsewhere_leaves_nothing_behind(pair):
    """Neither on its engine nor in the store."""
    tokens = draw_tokens(random.Random(3), 25 * BLOCK)
    begun = pair.b.begin(ask(tokens))
    pair.a.call("command_purge", ACME, "p2")
    pair.b.wait(*begun)
    pair.purged(pair.a, "p2")
    wait_until(lambda: not pair.names())
    (again,) = pair.b.run(ask(tokens))
    assert again.read == 0


@pytest.mark.engine
def test_an_engine_that_stood_still_serves_nobody_before_it_knows(pair):
    tokens, expected = shared(pair, 4)
    os.kill(pair.b.pid, signal.SIGSTOP)
    try:
        pair.a.call("command_purge", ACME, "p3")
        deadline = time.monotonic() + CONFIRM_S + 5
        while (answer := pair.a.call("command_purged", "p3")) is None:
            assert time.monotonic() < deadline
        assert len(answer["missing"]) == 1
        time.sleep(max(0.0, LATE_S - CONFIRM_S))
        # What it finds first is a request of that organisation.
        begun = pair.b.begin(ask(tokens))
    finally:
        os.kill(pair.b.pid, signal.SIGCONT)
    (again,) = pair.b.wait(*begun)
    assert (again.read, again.tokens) == (0, expected)
