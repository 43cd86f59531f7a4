"""The disk tier as one engine and several see it, while nothing is wrong."""

import os
import stat
import time

import pytest

from tests.disk.side import FILE, files
from tests.redis.engine_side import SECRET, SLOT, content, keys
from tests.redis.servers import wait_until
from vllm_cachescope.cache.quotas import Quotas
from vllm_cachescope.config import OrgQuota
from vllm_cachescope.tenancy.owner_tags import NOBODY, OwnerTags
from vllm_cachescope.tenancy.scope import Caller
from vllm_cachescope.tiers.inventory import Inventory

OWNERS = OwnerTags(SECRET)
ACME, ZETA = OWNERS.of(Caller("acme", "s1")), OWNERS.of(Caller("zeta"))


def test_another_engine_reads_what_one_has_stored(place, start_side):
    a, b = start_side(place), start_side(place)
    stored = keys(40)
    job = a.put(stored, ttl_s=300)
    assert a.finished[job].complete and a.finished[job].nbytes == 40 * SLOT
    assert b.get_exact(stored).keys == dict.fromkeys(stored, 300)
    assert b.get_exact(keys(3, "never stored")).keys == {}
    assert set(b.get_exact([*keys(3, "no"), *stored[2:5]]).keys) == set(stored[2:5])


def test_a_new_engine_finds_what_the_last_one_left(place, start_side):
    a = start_side(place)
    a.put(keys(30))
    a.close()
    assert set(start_side(place).get_exact(keys(30)).keys) == set(keys(30))


@pytest.mark.parametrize("difference", [{"identity": "another model"}, {"secret": b"x" * 20}])
def test_what_is_not_ours_is_not_found(place, start_side, difference):
    start_side(place).put(keys(3))
    assert start_side(place, **difference).get(keys(3)).keys == {}


def test_encrypted_blocks_come_back_and_show_nothing(place, start_side):
    side = start_side(place, encrypt=True)
    side.put(keys(3))
    assert set(side.get_exact(keys(3)).keys) == set(keys(3))
    assert all(content(key)[:64] not in f.read_bytes() for key in keys(3) for f in files(place))


def test_another_secret_is_refused_while_the_first_one_is_in_use(place, start_side, wall):
    a = start_side(place)
    b = start_side(place, secret=b"another secret, as long")
    assert a.tier.usable and not b.tier.usable
    assert "another secret" in b.tier.health()["reason"]
    a.close()
    wall.advance(61)
    wait_until(lambda: b.tier.usable)


def test_nobody_else_can_read_the_files(place, start_side):
    start_side(place).put(keys(3))
    found = [place, *place.rglob("*")]
    assert len(files(place)) == 3
    for path in found:
        mode = path.lstat().st_mode
        assert stat.S_IMODE(mode) == (0o700 if stat.S_ISDIR(mode) else 0o600), path


@pytest.mark.parametrize("trouble", ["a link", "open to others", "a file", "another's"])
def test_a_directory_that_others_may_use_is_refused(tmp_path, place, start_side, trouble):
    if trouble == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        place.symlink_to(tmp_path / "elsewhere")
    elif trouble == "a file":
        place.write_text("")
    else:
        place.mkdir(mode=0o700)
    if trouble == "open to others":
        place.chmod(0o750)
    if trouble == "another's":
        if os.geteuid():
            pytest.skip("needs to give a directory away")
        os.chown(place, 12345, 12345)
    side = start_side(place)
    assert not side.tier.usable
    assert str(place) in side.tier.health()["reason"]
    assert not files(place)


def test_entries_expire_are_reclaimed_and_counted(place, start_side, wall):
    side = start_side(place)
    side.put(keys(4), ttl_s=300)
    side.put(keys(6, "longer"), ttl_s=3600)
    wall.advance(301)
    assert set(side.get(keys(4) + keys(6, "longer")).keys) == set(keys(6, "longer"))
    wait_until(lambda: len(files(place)) == 6)
    wait_until(lambda: side.get(keys(1)) and side.tier.take_stats()["reclaim", "expired"] == 4)


def test_a_use_lets_an_entry_live_on_without_writing_it_again(place, start_side, wall):
    a, b = start_side(place), start_side(place)
    a.put(keys(2), ttl_s=300)
    before = [(f.name, f.stat().st_mtime_ns) for f in files(place)]
    wall.advance(200)
    b.use(keys(1), ttl_s=300)
    wait_until(lambda: b.tier.take_times() and not b.tier.queues()["touch"])
    # A use with a shorter lifetime takes nothing away.
    a.use(keys(1), ttl_s=10)
    time.sleep(0.05)
    wall.advance(250)
    assert set(a.get_exact(keys(2)).keys) == set(keys(1))
    assert [(f.name, f.stat().st_mtime_ns) for f in files(place)] in (
        before,
        before[:1],
        before[1:],
    )


def test_what_is_there_already_is_not_written_again(place, start_side):
    a, b = start_side(place), start_side(place)
    a.put(keys(20))
    before = files(place)
    b.put(keys(20), ttl_s=600)
    assert b.tier.take_stats()["store", "present"] == 20
    assert files(place) == before


def test_two_engines_that_store_the_same_at_once(place, start_side):
    sides = [start_side(place) for _ in range(2)]
    for i in range(5):
        jobs = [side.put(keys(30, str(i)), wait=False) for side in sides]
        for side, job in zip(sides, jobs, strict=True):
            assert side.step_until(job).complete
    assert len(files(place)) == 150
    assert sides[0].tier.health()["used_bytes"] >= 0
    for i in range(5):
        assert len(sides[0].get_exact(keys(30, str(i))).keys) == 30


def test_the_capacity_holds_for_all_engines_and_the_first_to_expire_go(place, start_side):
    sides = [start_side(place, capacity=20 * FILE) for _ in range(2)]
    for i in range(8):
        sides[i % 2].put(keys(5, str(i)), ttl_s=300 + i)
        assert len(files(place)) <= 20
    held = [len(sides[0].get_exact(keys(5, str(i))).keys) for i in range(8)]
    assert held == [0, 0, 0, 0, 5, 5, 5, 5]
    wait_until(lambda: sides[0].tier.health()["capacity_bytes"] == 20 * FILE)
    sides[1].use(keys(1))
    evicted = 0

    def all_told() -> bool:
        nonlocal evicted
        for side in sides:
            side.get(keys(1))
            evicted += side.tier.take_stats()["evict", "capacity"]
        return evicted == 20

    wait_until(all_told)
    absence = sides[1].tier.absence("r", keys(5, "0")[0])
    assert absence is None or absence.detail is None


def test_an_organisation_over_its_quota_loses_its_own(place, start_side):
    quotas = Quotas(SLOT, OrgQuota(quota=20 * SLOT), {ZETA[:8]: OrgQuota(quota=100 * SLOT)})
    sides = [start_side(place, quotas=quotas) for _ in range(2)]
    sides[0].put(keys(30, "zeta", ZETA))
    sides[0].put(keys(5))
    for i in range(8):
        sides[i % 2].put(keys(5, str(i), ACME), ttl_s=300 + i)
    held = [len(sides[0].get_exact(keys(5, str(i), ACME)).keys) for i in range(8)]
    assert held == [0, 0, 0, 0, 5, 5, 5, 5]
    assert len(sides[1].get_exact(keys(30, "zeta", ZETA) + keys(5)).keys) == 35
    assert sum(side.tier.take_stats()["evict", "quota"] for side in sides) == 20
    # A new engine counts what the others have stored.
    for side in sides:
        side.close()
    last = start_side(place, quotas=quotas)
    assert last.tier.health()["orgs"] == {
        ZETA[:8].hex(): 30 * SLOT,
        ACME[:8].hex(): 20 * SLOT,
        NOBODY[:8].hex(): 5 * SLOT,
    }
    last.put(keys(5, "new", ACME), ttl_s=400)
    assert last.get_exact(keys(5, "4", ACME)).keys == {}


def test_a_reserve_is_not_evicted_for_others(place, start_side):
    quotas = Quotas(SLOT, OrgQuota(), {ZETA[:8]: OrgQuota(reserve=8 * SLOT)})
    side = start_side(place, quotas=quotas, capacity=20 * FILE)
    side.put(keys(10, "zeta", ZETA), ttl_s=60)
    for i in range(8):
        side.put(keys(5, str(i), ACME), ttl_s=300 + i)
    # The two that it holds beyond its reserve went first.
    assert len(side.get_exact(keys(10, "zeta", ZETA)).keys) == 8
    assert len(files(place)) == 20


def test_free_disk_is_kept_and_given_back(place, small_disk, start_side):
    disk = small_disk(64 * FILE)
    path = disk / "tier"
    side = start_side(path, keep_free=20 * FILE)
    for i in range(12):
        side.put(keys(5, str(i)), ttl_s=300 + i)
    room = os.statvfs(disk)
    assert room.f_bavail * room.f_frsize >= 19 * FILE
    assert 30 < len(files(path)) < 45
    assert len(side.get_exact(keys(5, "11")).keys) == 5
    # Another program takes what is free; the tier gives way.
    (disk / "other").write_bytes(bytes(18 * FILE))
    wait_until(lambda: len(files(path)) < 27)
    assert side.tier.usable and len(side.get_exact(keys(5, "11")).keys) == 5


def test_purges_reach_what_other_engines_stored(place, start_side):
    a, b, other = start_side(place), start_side(place), start_side(place, identity="another")
    for owner in (ACME, ZETA, NOBODY):
        a.put(keys(5, "p", owner))
    other.put(keys(4, "p", ACME))
    for prefix, gone, left in ((ACME, 9, 10), (b"", 10, 0)):
        purge = b.tier.purge(prefix)
        wait_until(lambda purge=purge: purge.over)
        assert (purge.entries, purge.reason) == (gone, None)
        assert len(files(place)) == left


def test_routers_are_told_what_an_engine_stored_until_it_hears_that_it_is_gone(place, start_side):
    inventory = Inventory(time.monotonic)
    side = start_side(place, capacity=10 * FILE, inventory=inventory)
    side.put(keys(6), ttl_s=300)
    assert side.tier.take_changes() == [(keys(6), False)]
    side.put(keys(6, "more"), ttl_s=400)
    side.tier.take_changes()
    wait_until(lambda: side.get(keys(1, "other")) and len(side.tier.held()) == 10)
