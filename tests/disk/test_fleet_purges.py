"""A purge on one of two engines that share a directory and no Redis: the other one carries it out
as well."""

import random
import time

import pytest

from tests.disk.side import index
from tests.engine.engine import OWNERS
from tests.redis.test_fleet_purges import announced, follows, heard, heeding
from vllm_cachescope.connectors.disk import purge_log
from vllm_cachescope.connectors.disk.index import Index
from vllm_cachescope.connectors.disk.purge_log import DiskPurgeLog
from vllm_cachescope.tiers.fleet_purges import FOLLOW_S
from vllm_cachescope.tiers.purge_log import RETENTION_S, News
from vllm_cachescope.tiers.purge_notices import PurgeNotice

ACME = OWNERS.prefix("acme")


def test_others_confirm_by_name(place, start_side):
    sides = [start_side(place, name=name) for name in ("a", "b", "c")]
    for side in sides:
        follows(side)
    end = heeding(*sides[1:])
    notice = PurgeNotice("p", ACME, "acme", "s1")
    done = announced(sides[0], notice)
    assert end() == [notice, notice]
    assert (done.confirmed, done.missing) == (["b", "c"], {})
    time.sleep(2 * FOLLOW_S)
    assert [heard(side) for side in sides] == [[], [], []]


def test_only_those_with_the_secret_are_heard(place, start_side):
    a = start_side(place, name="a")
    b = start_side(place, name="b", secret=b"another secret of the tests", identity="another model")
    follows(a), follows(b)
    end = heeding(a, b)
    done = announced(a, PurgeNotice("p", ACME))
    assert end() == [] and (done.confirmed, done.missing) == ([], {})


def test_without_the_directory_a_purge_says_so(place, start_side):
    a = start_side(place, name="a")
    follows(a)
    place.chmod(0o755)
    index(place).unlink()
    done = announced(a, PurgeNotice("p", ACME))
    assert "could not be told" in done.missing["other replicas"]


@pytest.fixture
def log(place, start_side, wall):
    """The log as one thread has it."""
    store = start_side(place).new_store()
    store.connect(time.monotonic() + 5)
    yield store.purge_log()
    store.close()


def follow(log: DiskPurgeLog, since: int, claim: bytes = b"c") -> News:
    return log.follow(b"f", claim, since, time.monotonic() + 5)


def test_positions_grow_whatever_the_clock_does(log, wall):
    chance, positions = random.Random(3), []
    for i in range(30):
        wall.advance(chance.choice([-3600, -0.5, 0, 0.001, 60]))
        positions.append(log.announce(b"%d" % i, time.monotonic() + 5))
        assert positions[-1] <= follow(log, 0).now
    assert positions == sorted(set(positions))
    assert log.announce(b"7", time.monotonic() + 5) == positions[7]
    assert follow(log, positions[27]).entries == [(positions[28], b"28"), (positions[29], b"29")]


def test_what_is_old_goes(log, wall):
    first = log.announce(b"old", time.monotonic() + 5)
    assert follow(log, 0).is_new and not follow(log, 0).is_new
    assert follow(log, 0).complete_from < first
    wall.advance(RETENTION_S + 1)
    log.announce(b"new", time.monotonic() + 5)
    news = follow(log, 0)
    assert [entry for _, entry in news.entries] == [b"new"] and news.complete_from > first


def test_what_goes_early_shows(log, monkeypatch):
    monkeypatch.setattr(purge_log, "MAX_ENTRIES", 3)
    positions = [log.announce(b"%d" % i, time.monotonic() + 5) for i in range(5)]
    news = follow(log, 0)
    assert [at for at, _ in news.entries] == positions[2:]
    assert news.complete_from == positions[1]


def test_followers_are_listed_until_they_have_gone(log, wall):
    def listed() -> list[tuple[bytes, float]]:
        found = log.followers(time.monotonic() + 5)
        return [(one.claim, one.idle_s) for one in found if one.follower_id == b"f"]

    follow(log, 0, b"claim")
    wall.advance(30)
    assert listed() == [(b"claim", pytest.approx(30))]
    follow(log, 0, b"other")
    assert listed() == [(b"other", pytest.approx(0))]
    wall.advance(purge_log.GONE_S + 1)
    listed()
    assert listed() == []


def test_an_index_of_an_earlier_version_gets_a_log(place, start_side):
    a = start_side(place, name="a")
    follows(a)
    a.close()
    old = Index(index(place))
    for table in ("notices", "followers", "cuts"):
        old.run(f"DROP TABLE {table}")
    old.close()
    b, c = start_side(place, name="b"), start_side(place, name="c")
    follows(b), follows(c)
    end = heeding(c)
    assert announced(b, PurgeNotice("p", ACME)).confirmed == ["c"]
    end()
