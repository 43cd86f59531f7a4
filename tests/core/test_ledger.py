"""TtlReplay: refreshed on use, over when they are over, on every tier alike."""

import time

from vllm_cachescope.cache.eviction import LifetimeShare
from vllm_cachescope.cache.ledger import Ledger


def resident(ledger: Ledger) -> dict[tuple[str, int], int]:
    return {(tier, ttl): blocks for tier, ttl, blocks in ledger.resident() if blocks}


def test_a_use_starts_the_lifetime_again() -> None:
    ledger = Ledger()
    assert ledger.touch(b"a", 300, now=0)
    assert not ledger.touch(b"a", 300, now=200)
    assert not ledger.is_expired(b"a", 499)
    assert ledger.is_expired(b"a", 500)


def test_the_longer_lifetime_counts_and_stays() -> None:
    ledger = Ledger()
    ledger.touch(b"a", 300, now=0)
    ledger.place(b"a", "device")
    ledger.touch(b"a", 3600, now=1)
    ledger.touch(b"a", 300, now=2)
    assert ledger.get(b"a").expires_at == 3602  # type: ignore[union-attr]
    assert resident(ledger) == {("device", 3600): 1}


def test_expired_entries_come_out_of_every_class_and_leave_every_tier() -> None:
    ledger = Ledger()
    for key, ttl in ((b"a", 300), (b"b", 3600), (b"c", 300)):
        ledger.touch(key, ttl, now=0)
        ledger.place(key, "device")
        ledger.place(key, "cpu")
    ledger.touch(b"c", 300, now=100)
    assert [key for key, _ in ledger.pop_expired(300)] == [b"a"]
    assert resident(ledger) == {
        ("device", 300): 1, ("device", 3600): 1, ("cpu", 300): 1, ("cpu", 3600): 1
    }  # fmt: skip
    assert {key for key, _ in ledger.pop_expired(3600)} == {b"b", b"c"}
    assert resident(ledger) == {} and len(ledger) == 0


def test_what_no_tier_holds_is_forgotten() -> None:
    ledger = Ledger()
    ledger.touch(b"a", 300, now=0)
    ledger.place(b"a", "device")
    ledger.place(b"a", "cpu")
    ledger.displace(b"a", "device")
    assert b"a" in ledger
    ledger.displace(b"a", "cpu")
    assert b"a" not in ledger
    assert ledger.touch(b"a", 300, now=1), "computed again, it is new again"


def test_emptying_a_tier_leaves_the_others() -> None:
    ledger = Ledger()
    for key in (b"a", b"b"):
        ledger.touch(key, 300, now=0)
        ledger.place(key, "device")
    ledger.place(b"b", "cpu")
    emptied = [(key, entry.ttl_s) for key, entry in ledger.clear_tier("device")]
    assert emptied == [(b"a", 300), (b"b", 300)]
    assert b"a" not in ledger
    assert resident(ledger) == {("cpu", 300): 1}


def test_with_one_class_the_policy_is_lru() -> None:
    policy = LifetimeShare()
    for now, key in enumerate((b"a", b"b", b"c")):
        policy.use(key, 300, now)
    policy.use(b"a", 300, 3)
    assert policy.victims(3, 10, must_stay=lambda key: False) == [b"b", b"c", b"a"]


def test_idling_counts_against_the_lifetime() -> None:
    policy = LifetimeShare()
    policy.use(b"hour", 3600, now=0)
    policy.use(b"minutes", 300, now=540)
    # After 600 s: 600/3600 of the hour, 60/300 of the five minutes.
    assert policy.victims(1, 600, must_stay=lambda key: False) == [b"minutes"]
    # After 1000 s: 0.28 and 1.53; with the short one spared, the long one goes.
    assert policy.victims(1, 1000, must_stay=lambda key: key == b"minutes") == [b"hour"]


def test_too_few_victims_is_none_and_changes_nothing() -> None:
    policy = LifetimeShare()
    policy.use(b"a", 300, 0)
    policy.use(b"b", 300, 1)
    assert policy.victims(2, 5, must_stay=lambda key: key == b"b") is None
    assert policy.victims(2, 5, must_stay=lambda key: False) == [b"a", b"b"]


def test_a_purge_costs_what_it_finds() -> None:
    ledger = Ledger()
    for i in range(30_000):
        ledger.touch(b"%d" % i, 300, 0, b"acme    session%d" % (i % 10))
    began = time.perf_counter()
    for i in range(1_000):
        assert ledger.purge(b"acme    made %03d" % i) == []
    # Thirty thousand looks a purge would be some seconds.
    assert time.perf_counter() - began < 0.5
    assert len(ledger.purge(b"acme    session3")) == 3_000
    assert len(ledger.purge(b"acme    ")) == 27_000
    assert len(ledger) == 0
