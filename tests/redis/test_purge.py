"""What a purge leaves in a store: everything else."""

import pytest
import redis

from tests.redis.engine_side import SECRET, SLOT, EngineSide, keys
from tests.redis.servers import Proxy, wait_until
from vllm_cachescope.tenancy.owner_tags import NOBODY, OwnerTags
from vllm_cachescope.tenancy.scope import Caller
from vllm_cachescope.tiers.jobs import Purge
from vllm_cachescope.tiers.keyspace import FORMAT, OwnerNames

OWNERS = OwnerTags(SECRET)
HELD = {
    NOBODY: 4,
    OWNERS.of(Caller("acme")): 7,
    OWNERS.of(Caller("acme", "s1")): 30,
    OWNERS.of(Caller("acme", "s2")): 3,
    OWNERS.of(Caller("zeta", "s1")): 5,
}


def held_by(owner: bytes) -> list[bytes]:
    return keys(HELD[owner], "held", owner)


def everything() -> list[bytes]:
    return [key for owner in HELD for key in held_by(owner)]


def fill(side: EngineSide) -> None:
    for owner in HELD:
        side.put(held_by(owner))


def purge(side: EngineSide, prefix: bytes) -> Purge:
    purge = side.tier.purge(prefix)
    wait_until(lambda: purge.over)
    return purge


@pytest.mark.parametrize(
    ("prefix", "entries"),
    [
        (OWNERS.prefix("acme", "s1"), 30),
        (OWNERS.prefix("acme"), 40),
        (OWNERS.prefix("global"), 4),
        (OWNERS.prefix("unheard of"), 0),
        (b"", 49),
    ],
    ids=["session", "org", "global", "nobody", "all"],
)
def test_just_what_is_named_goes(server, start_engine_side, prefix, entries):
    a, b = start_engine_side(server.url), start_engine_side(server.url)
    fill(a)
    server.client.set("something else", "of another program")
    done = purge(b, prefix)
    assert (done.entries, done.reason) == (entries, None)
    left = [key for key in everything() if not key.startswith(prefix)]
    assert set(a.get_exact(everything()).keys) == set(left)
    assert server.client.exists("something else")
    assert b.tier.usable
    assert purge(b, prefix).entries == 0


def test_other_models_are_purged_as_well_and_other_secrets_organisations_are_not(
    server, start_engine_side
):
    sides = [start_engine_side(server.url, identity=model) for model in ("one", "other")]
    theirs = start_engine_side(server.url, identity="theirs", secret=b"another secret, as long")
    their_acme = keys(5, "theirs", OwnerTags(b"another secret, as long").of(Caller("acme")))
    for side in sides:
        fill(side)
    theirs.put(their_acme)
    assert purge(sides[0], OWNERS.prefix("acme")).entries == 2 * 40
    assert len(theirs.get_exact(their_acme).keys) == 5


def fill_with_others(server, count: int = 20_000) -> None:
    with server.client.pipeline(transaction=False) as pipeline:
        for i in range(count):
            pipeline.set(f"filler {i}", "x")
        pipeline.execute()


def scans(server) -> int:
    stats = server.client.info("commandstats")
    assert "cmdstat_keys" not in stats
    return stats.get("cmdstat_scan", {"calls": 0})["calls"]


def test_a_purge_looks_at_nothing_but_the_owners_entries(server, start_engine_side):
    side = start_engine_side(server.url)
    fill(side)
    fill_with_others(server)
    for prefix, entries in ((OWNERS.prefix("acme", "made up"), 0), (OWNERS.prefix("acme"), 40)):
        assert purge(side, prefix).entries == entries
        assert scans(server) == 0
    # Everything is looked through in steps.
    assert purge(side, b"").entries == 9
    assert 20 <= scans(server) <= 40
    assert sum(1 for _ in server.client.scan_iter("filler*")) == 20_000


@pytest.mark.parametrize("lost", ["evicted", "begun by another server"])
def test_an_index_that_may_have_lost_something_is_not_trusted(server, start_engine_side, lost):
    """A purge never claims what it does not know."""
    side = start_engine_side(server.url)
    fill(side)
    if lost == "evicted":
        server.client.config_set("maxmemory-policy", "volatile-lru")
        full = server.client.info("memory")["used_memory"]
        server.client.config_set("maxmemory", full - 2 * SLOT)
        server.client.set("filler", "x")
        server.client.config_set("maxmemory", 0)
        assert server.client.info("stats")["evicted_keys"] > 0
    else:
        # As a replica that has been made the primary, or one that was restarted with its data.
        names = OwnerNames(side.keyspace.namespace.encode())
        server.client.set(names.began, "the id of another server", keepttl=True)
    for name in server.client.scan_iter(f"cachescope:{FORMAT}:*:entries:*"):
        server.client.delete(name)
    left = {key for key in everything() if server.client.exists(side.name(key))}
    mine = {key for key in left if key.startswith(OWNERS.prefix("acme"))}
    assert purge(side, OWNERS.prefix("acme")).entries == len(mine) > 30
    assert {key for key in everything() if server.client.exists(side.name(key))} == left - mine


def test_what_a_user_without_rights_to_the_index_stores_is_purged_as_well(
    server, start_engine_side
):
    rights = "~cachescope:* +set +get +exists +pexpire +pttl +unlink +eval +setrange"
    server.client.execute_command(f"ACL SETUSER kv on >pw {rights}")
    knowing = start_engine_side(server.url)
    fill(knowing)
    unindexed = keys(6, "unindexed", OWNERS.of(Caller("acme")))
    start_engine_side(f"redis://kv:pw@127.0.0.1:{server.port}").put(unindexed)
    assert purge(knowing, OWNERS.prefix("acme")).entries == 46
    assert len(knowing.get_exact(held_by(NOBODY)).keys) == 4


def test_what_waits_to_be_stored_is_not_stored(server, start_engine_side):
    side = start_engine_side(server.url)
    server.stop()
    owner, other = OWNERS.of(Caller("acme", "s1")), OWNERS.of(Caller("zeta", "s1"))
    # The first batch is under way; of the others none may follow.
    job = side.put(keys(30, "waiting", owner), wait=False)
    kept = side.put(keys(5, "waiting", other), wait=False)
    done = side.tier.purge(OWNERS.prefix("acme"))
    server.resume()
    wait_until(lambda: done.over)
    assert not side.step_until(job).complete
    assert side.step_until(kept).complete
    assert side.get(keys(30, "waiting", owner)).keys == {}
    assert len(side.get_exact(keys(5, "waiting", other)).keys) == 5


def test_entries_are_misses_from_the_moment_they_are_purged(server, start_engine_side):
    side = start_engine_side(server.url, load_deadline_s=5.0, timeout_s=5.0)
    fill(side)
    mine = held_by(OWNERS.of(Caller("acme")))
    request, hits, _ = side.find(mine)
    assert len(hits) == 7
    server.stop()
    done = side.tier.purge(OWNERS.prefix("acme"))
    assert side.tier.lookup(request, mine[0]).value == "miss"
    assert not done.over
    server.resume()
    wait_until(lambda: done.over)


def test_a_store_that_is_down_or_forbids_it_is_named_with_the_reason(server, start_engine_side):
    rights = "~cachescope:* +set +get +exists +pexpire +pttl +unlink +eval +setrange"
    server.client.execute_command(f"ACL SETUSER kv on >pw {rights}")
    side = start_engine_side(f"redis://kv:pw@127.0.0.1:{server.port}")
    fill(side)
    assert "NOPERM" in purge(side, OWNERS.prefix("acme")).reason
    # It goes on as before.
    assert len(side.get_exact(everything()).keys) == 49
    server.client.execute_command("ACL SETUSER kv +scan")
    assert purge(side, OWNERS.prefix("acme")).entries == 40
    server.kill()
    side.get(everything())
    side.get(everything())
    wait_until(lambda: not side.tier.usable)
    assert purge(side, OWNERS.prefix("acme")).reason


def test_a_store_that_dies_meanwhile(server, start_engine_side):
    proxy = Proxy(server.port)
    side = start_engine_side(proxy.url)
    fill(side)
    for i in range(200):
        server.client.set(f"filler {i}", "x")
    proxy.cut_after = 100
    assert purge(side, OWNERS.prefix("acme")).reason
    proxy.cut_after = None
    # What was under way when the line was mended may still fail.
    wait_until(lambda: purge(side, OWNERS.prefix("acme")).reason is None)
    assert set(side.get_exact(everything()).keys) == {
        *held_by(NOBODY),
        *held_by(OWNERS.of(Caller("zeta", "s1"))),
    }
    proxy.close()


def test_on_every_node_of_a_cluster(nodes, start_engine_side):
    for node in nodes:
        node.client.flushall()
    side = start_engine_side(f"redis+cluster://127.0.0.1:{nodes[1].port}", timeout_s=5.0)
    fill(side)
    assert purge(side, OWNERS.prefix("acme")).entries == 40
    client = redis.RedisCluster("127.0.0.1", nodes[0].port)
    assert sum(client.exists(side.name(key)) for key in everything()) == 9
    client.close()
