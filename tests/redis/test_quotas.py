"""What organisations may hold in a store that several engines share."""

import time

import pytest
import redis

from tests.redis.engine_side import SECRET, SLOT, EngineSide, keys
from tests.redis.servers import beside_engines, wait_until
from vllm_cachescope.cache.quotas import Quotas
from vllm_cachescope.config import OrgQuota
from vllm_cachescope.connectors.redis.server_clock import CLOCK_S, ServerClock
from vllm_cachescope.tenancy.owner_tags import NOBODY, UNLISTED_TAG, OwnerTags
from vllm_cachescope.tenancy.scope import Caller
from vllm_cachescope.tiers.keyspace import names_of
from vllm_cachescope.tiers.local_usage import LocalUsage

OWNERS = OwnerTags(SECRET)
ACME, ZETA = OWNERS.of(Caller("acme", "s1")), OWNERS.of(Caller("zeta"))
QUOTA = Quotas(SLOT, OrgQuota(quota=20 * SLOT), {ZETA[:8]: OrgQuota(quota=100 * SLOT)})


def mine(owner: bytes, number: int, count: int = 5) -> list[bytes]:
    """Return the keys of a prompt."""
    return keys(count, f"prompt {number}", owner)


def held(side: EngineSide, owner: bytes, prompts: range) -> list[int]:
    """Return which of an owner's prompts the store holds whole."""
    return [i for i in prompts if set(side.get(mine(owner, i)).keys) == set(mine(owner, i))]


def usage(side: EngineSide, owner: bytes) -> bytes:
    return side.keyspace.usage(owner[:8])


def test_engines_that_flood_a_store_together_lose_their_own_oldest(server, start_engine_side):
    sides = [start_engine_side(server.url, quotas=QUOTA) for _ in range(2)]
    for i in range(6):
        sides[0].put(mine(ZETA, i))
    sides[0].put(mine(NOBODY, 0))
    for i in range(12):
        sides[i % 2].put(mine(ACME, i))
        assert server.client.zcard(usage(sides[0], ACME)) <= 20
    assert held(sides[1], ACME, range(12)) == [8, 9, 10, 11]
    assert held(sides[1], ZETA, range(6)) == list(range(6))
    assert held(sides[1], NOBODY, range(1)) == [0]
    evicted = sum(side.tier.take_stats()["evict", "quota"] for side in sides)
    assert evicted == 40
    reasons = {
        absence.detail for side in sides if (absence := side.tier.absence("r", mine(ACME, 0)[0]))
    }
    assert "the organisation's quota was full" in reasons
    # Nobody has to clean up after the last engine: all there is expires.
    names = set(server.client.scan_iter())
    for name in names:
        most_ms = 3_600_000 if name in beside_engines(server) else 300_000
        assert 0 < server.client.pttl(name) <= most_ms, name


@pytest.mark.parametrize("used", [False, True])
def test_a_prompt_loses_its_end_before_its_beginning(server, start_engine_side, used):
    side = start_engine_side(server.url, quotas=QUOTA)
    for i in range(4):
        side.put(mine(ACME, i))
    if used:
        for i in range(4):
            side.use(mine(ACME, i), 600)
        soonest = (usage(side, ACME), 0, 0)
        ahead_us = 1e6 * (time.time() + 500)
        wait_until(lambda: server.client.zrange(*soonest, withscores=True)[0][1] > ahead_us)
    side.put(mine(ACME, 4)[:3], ttl_s=900)
    left = [set(side.get(mine(ACME, i)).keys) for i in range(4)]
    assert left == [set(mine(ACME, i)[: len(blocks)]) for i, blocks in enumerate(left)]
    assert sum(map(len, left)) == 17


@pytest.mark.parametrize("counted", ["there", "here"])
def test_a_prompt_stored_in_parts_keeps_its_beginning(server, start_engine_side, counted):
    """Each step of a long prefill stores what it has computed."""
    how = {"quotas": QUOTA} if counted == "there" else {"local_usage": LocalUsage(QUOTA)}
    side = start_engine_side(server.url, **how)
    for i in range(2):
        side.put(mine(ACME, i))
    prompt, used_at = mine(ACME, 9, 32), time.monotonic()
    for first in range(0, 32, 4):
        side.put(prompt[first : first + 4], used_at=used_at, behind=first)
    assert set(side.get(prompt).keys) == set(prompt[:20])
    assert held(side, ACME, range(2)) == []


def test_the_servers_clock_is_reckoned_anew_only_where_that_was_wrong():
    clock = ServerClock()
    assert clock.ahead_s is None and clock.is_due(0)
    # Answers that took long say little, and do not contradict.
    for server_s, asked, answered, ahead_s in (
        (1000.4, 0, 1, 999.9),
        (1021.2, 21.1, 21.5, 999.9),
        (1042.9, 42, 44, 999.9),
        (1064.2, 64.1, 64.1, 1000.1),
        (1084.0, 85.0, 85.2, 998.9),
    ):
        assert clock.is_due(asked)
        clock.learn(server_s, asked, answered)
        assert clock.ahead_s == pytest.approx(ahead_s)
        assert not clock.is_due(answered + CLOCK_S - 1)


def test_what_is_used_is_not_the_oldest(server, start_engine_side):
    a, b = (start_engine_side(server.url, quotas=QUOTA) for _ in range(2))
    for i in range(4):
        a.put(mine(ACME, i), ttl_s=300)
    scores = dict(server.client.zrange(usage(a, ACME), 0, -1, withscores=True))
    b.use(mine(ACME, 0), 600)
    wait_until(
        lambda: (
            sum(
                server.client.zscore(usage(a, ACME), member) > score + 290_000_000
                for member, score in scores.items()
            )
            == 5
        )
    )
    # What is found there is used as well.
    b.put(mine(ACME, 1), ttl_s=500)
    a.put(mine(ACME, 4) + mine(ACME, 5))
    assert held(a, ACME, range(6)) == [0, 1, 4, 5]
    assert server.client.pttl(usage(a, ACME)) > 590_000


def test_a_use_of_what_is_not_there_counts_for_nothing(server, start_engine_side):
    side = start_engine_side(server.url, quotas=QUOTA)
    side.use(mine(ACME, 0))
    side.put(mine(ZETA, 0))
    assert not server.client.exists(usage(side, ACME))
    assert server.client.zcard(side.keyspace.accounts) == 1


def test_what_has_expired_does_not_count(server, start_engine_side):
    side = start_engine_side(server.url, quotas=QUOTA)
    for i in range(4):
        side.put(mine(ACME, i))
    for member in server.client.zrange(usage(side, ACME), 0, 9):
        server.client.zadd(usage(side, ACME), {member: 1})
    side.put(mine(ACME, 4) + mine(ACME, 5))
    assert held(side, ACME, range(6)) == list(range(6))
    assert server.client.zcard(usage(side, ACME)) == 20


def test_over_the_capacity_reserves_are_spared(server, start_engine_side):
    quotas = Quotas(SLOT, OrgQuota(), {ZETA[:8]: OrgQuota(reserve=10 * SLOT)}, capacity=30 * SLOT)
    side = start_engine_side(server.url, quotas=quotas)
    third = OWNERS.of(Caller("third", "s"))
    for i in range(2):
        side.put(mine(ZETA, i))
    side.put(mine(third, 0))
    others: list[int] = []

    def is_full() -> bool:
        # All together are counted every second.
        side.put(mine(ACME, len(others)))
        others.append(len(others))
        return side.tier.take_stats().get(("evict", "quota"), 0) > 0

    wait_until(is_full)
    assert held(side, ZETA, range(2)) == [0, 1]
    assert held(side, third, range(1)) == []
    assert held(side, ACME, range(len(others)))[-1] == others[-1]
    assert sum(1 for _ in server.client.scan_iter(names_of(b""))) <= 30 + 5


def test_organisations_that_anyone_can_make_up_share_one_quota(server, start_engine_side):
    sides = [start_engine_side(server.url, quotas=QUOTA) for _ in range(2)]
    made_up = [OWNERS.of(Caller(f"key:{i}", "s"), is_listed=False) for i in range(12)]
    sides[0].put(mine(ZETA, 0))
    for i, owner in enumerate(made_up):
        sides[i % 2].put(mine(owner, i))
    left = [i for i, owner in enumerate(made_up) if held(sides[0], owner, range(i, i + 1))]
    assert left == [8, 9, 10, 11]
    assert held(sides[0], ZETA, range(1)) == [0]
    together = start_engine_side(server.url, quotas=QUOTA).tier.health()["orgs"]
    assert together[UNLISTED_TAG.hex()] == 20 * SLOT
    # A purge still finds one of them, and counts what it has deleted.
    done = sides[0].tier.purge(made_up[9][:8])
    wait_until(lambda: done.over)
    assert (done.entries, server.client.zcard(sides[0].keyspace.usage(UNLISTED_TAG))) == (5, 15)


def test_a_purge_is_counted(server, start_engine_side):
    sides = [start_engine_side(server.url, quotas=QUOTA, identity=model) for model in "ab"]
    for side in sides:
        for owner in (ACME, ZETA):
            side.put(mine(owner, 0))
    done = sides[0].tier.purge(OWNERS.prefix("acme", "s1"))
    wait_until(lambda: done.over)
    assert (done.entries, done.reason) == (10, None)
    for side in sides:
        assert not server.client.exists(usage(side, ACME))
        assert server.client.zcard(usage(side, ZETA)) == 5
    for i in range(4):
        sides[0].put(mine(ACME, i))
    assert held(sides[0], ACME, range(4)) == [0, 1, 2, 3]


def test_without_the_rights_it_stores_all_the_same_and_says_so(server, start_engine_side, caplog):
    rights = "~cachescope:* +set +get +exists +pexpire +pttl +unlink +eval +setrange"
    server.client.execute_command(f"ACL SETUSER kv on >pw {rights}")
    url = f"redis://kv:pw@127.0.0.1:{server.port}"
    side = start_engine_side(url, quotas=QUOTA)
    for i in range(6):
        side.put(mine(ACME, i))
    assert held(side, ACME, range(6)) == list(range(6))
    assert "Quotas are not kept in Redis: NOPERM" in caplog.text
    more = "+time +zadd +zcard +zrange +zpopmin +zrem +zremrangebyscore +pexpireat"
    server.client.execute_command(f"ACL SETUSER kv {more}")
    for i in range(6):
        side.put(mine(ACME, i))
    assert len(held(side, ACME, range(6))) <= 4


def test_health_tells_who_holds_how_much(server, start_engine_side):
    first = start_engine_side(server.url, quotas=QUOTA)
    first.put(mine(ACME, 0))
    assert start_engine_side(server.url, quotas=QUOTA).tier.health()["orgs"] == {
        ACME[:8].hex(): 5 * SLOT
    }


def test_on_a_cluster(nodes, start_engine_side):
    for node in nodes:
        node.client.flushall()
    url = f"redis+cluster://127.0.0.1:{nodes[1].port}"
    sides = [start_engine_side(url, quotas=QUOTA, timeout_s=5.0) for _ in range(2)]
    for i in range(12):
        sides[i % 2].put(mine(ACME, i))
    for i in range(2):
        sides[i].put(mine(ZETA, i))
    assert held(sides[1], ACME, range(12)) == [8, 9, 10, 11]
    assert held(sides[1], ZETA, range(2)) == [0, 1]
    client = redis.RedisCluster("127.0.0.1", nodes[0].port)
    assert client.zcard(usage(sides[0], ACME)) == 20
    client.close()


@pytest.mark.parametrize("count", [4, 12])
def test_a_store_that_does_not_count_is_counted_by_each_engine(server, start_engine_side, count):
    side = start_engine_side(server.url, local_usage=LocalUsage(QUOTA))
    other = start_engine_side(server.url)
    for i in range(count):
        side.put(mine(ACME, i))
    other.put(mine(ACME, 99))
    assert held(side, ACME, range(count)) == list(range(count))[-4:]
    assert held(side, ACME, range(99, 100)) == [99]
    assert not server.client.keys("*held*")
    if count > 4:
        assert side.tier.take_stats()["evict", "quota"] == 5 * (count - 4)
    done = side.tier.purge(b"")
    wait_until(lambda: done.over)
    assert side.tier.health()["orgs"] == {}
