"""A neighbour who may do anything in Redis, and has not got the secret: all it gets is misses."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import pytest

from tests.redis.engine_side import SECRET, SLOT, EngineSide, content, keys
from tests.redis.servers import RedisServer, entries, wait_until
from tests.redis.wall import Wall
from vllm_cachescope.connectors.redis.store import CLOCKS_APART_MS, FRONT_BYTES
from vllm_cachescope.tiers.envelope import HEADER_BYTES, EncryptedEnvelopes, Envelopes
from vllm_cachescope.tiers.jobs import Outgoing
from vllm_cachescope.tiers.keyspace import FORMAT
from vllm_cachescope.tiers.leases import LEASE_BYTES, Leases

DAY_S = 86_400
APART_S = CLOCKS_APART_MS / 1000

either = pytest.mark.parametrize("encrypt", [False, True], ids=["in the clear", "encrypted"])


@pytest.fixture
def wall() -> Wall:
    return Wall()


@pytest.fixture
def encrypt() -> bool:
    """Whether the values are encrypted, where a test does not say."""
    return False


@pytest.fixture
def side(server, wall, encrypt, start_engine_side) -> EngineSide:
    """An engine whose wall clock is driven, with two blocks stored for 300 s."""
    side = start_engine_side(server.url, wall=wall, encrypt=encrypt)
    side.put(keys(2), ttl_s=300)
    return side


@dataclass
class Neighbour:
    """Someone with every right in a Redis.

    Attributes:
        client: a client of the Redis.
        name: of the value that is tampered with.
        key: the tier's key of that value.
        other: the name of another value of the same model.
        side: the engine, of which a neighbour knows all but the secret.
    """

    client: object
    name: bytes
    key: bytes
    other: bytes
    side: EngineSide

    def swap_in(self, value: bytes) -> None:
        """Put another value in the place of the one that is there, for a day."""
        self.client.set(self.name, value, ex=DAY_S)

    def value(self) -> bytes:
        """Return the value that is there."""
        return self.client.get(self.name)

    def forged(self, secret: bytes) -> bytes:
        """Return a value of other content, under a secret of the neighbour's own."""
        namespace = self.side.keyspace.namespace
        encrypts = isinstance(self.side.envelopes, EncryptedEnvelopes)
        make = (lambda *a: EncryptedEnvelopes(*a, SLOT)) if encrypts else Envelopes
        block = Outgoing(self.key, memoryview(b"\x66" * SLOT), DAY_S, 0.0)
        with make(secret, namespace).sealing([block]) as (value,):
            return value.head + self.lease(secret) + bytes(value.payload)

    def lease(self, secret: bytes, name: bytes | None = None) -> bytes:
        """Return a lease of a day, under a secret of the neighbour's own."""
        ends_at_ms = int((self.side.wall() + DAY_S) * 1000)
        return Leases(secret).grant(name or self.name, ends_at_ms)


def neighbour(server: RedisServer, side: EngineSide, key: bytes = keys(1)[0]) -> Neighbour:
    return Neighbour(server.client, side.name(key), key, side.name(keys(2)[1]), side)


def flipped(value: bytes, at: int) -> bytes:
    return value[:at] + bytes([value[at] ^ 0x10]) + value[at + 1 :]


ATTACKS: dict[str, Callable[[Neighbour], object]] = {
    "a value under another secret": lambda n: n.swap_in(n.forged(b"a secret of the neighbour")),
    "under a secret that is empty": lambda n: n.swap_in(n.forged(b"")),
    "a forged value with the genuine lease": lambda n: n.swap_in(
        n.forged(b"x")[:HEADER_BYTES]
        + n.value()[HEADER_BYTES:FRONT_BYTES]
        + n.forged(b"x")[FRONT_BYTES:]
    ),
    "another value": lambda n: n.swap_in(n.client.get(n.other)),
    "another value with the genuine lease": lambda n: n.swap_in(
        n.client.get(n.other)[:HEADER_BYTES]
        + n.value()[HEADER_BYTES:FRONT_BYTES]
        + n.client.get(n.other)[FRONT_BYTES:]
    ),
    "the payload of another value": lambda n: n.swap_in(
        n.value()[:FRONT_BYTES] + n.client.get(n.other)[FRONT_BYTES:]
    ),
    "a payload of its own": lambda n: n.client.setrange(n.name, FRONT_BYTES, b"\x66" * SLOT),
    "a bit of the TTL": lambda n: n.swap_in(flipped(n.value(), 10)),
    "a bit of the payload": lambda n: n.swap_in(flipped(n.value(), FRONT_BYTES + SLOT // 2)),
    "the end of the lease": lambda n: n.client.setrange(
        n.name, HEADER_BYTES, n.lease(SECRET)[: LEASE_BYTES - 16]
    ),
    "a lease under another secret": lambda n: n.client.setrange(
        n.name, HEADER_BYTES, n.lease(b"a secret of the neighbour")
    ),
    "the lease of another entry": lambda n: n.client.setrange(
        n.name, HEADER_BYTES, n.lease(SECRET, n.other)
    ),
    "no expiry": lambda n: n.client.persist(n.name),
    "another type": lambda n: (n.client.delete(n.name), n.client.rpush(n.name, "a list")),
    "a value of the last version": lambda n: n.swap_in(b"CSKV\1" + n.value()[5:]),
}


@either
def test_what_is_not_genuine_is_a_miss_and_deleted(server, side, encrypt, caplog):
    attacked = keys(len(ATTACKS), "attacked")
    side.put(attacked)
    for key, attack in zip(attacked, ATTACKS.values(), strict=True):
        attack(neighbour(server, side, key))
    served = side.get_exact([*attacked, *keys(1)]).keys
    assert [name for key, name in zip(attacked, ATTACKS, strict=True) if key in served] == []
    assert set(served) == {*keys(1)}
    assert side.tier.take_stats()["load", "damaged"] == len(ATTACKS)
    # Genuine values can take their place, and nothing else has suffered.
    wait_until(lambda: not any(server.client.exists(side.name(key)) for key in attacked))
    side.put(attacked)
    assert set(side.get_exact(attacked).keys) == set(attacked)
    assert side.tier.usable


def test_the_log_tells_of_each_kind_once(server, start_engine_side, caplog):
    side = start_engine_side(server.url)
    for _ in range(2):
        side.put(keys(30))
        for key in keys(30)[:20]:
            server.client.setrange(side.name(key), FRONT_BYTES, b"forged")
        for key in keys(30)[20:]:
            server.client.persist(side.name(key))
        assert side.get_exact(keys(30)).keys == {}
        wait_until(lambda: not entries(server))
    assert side.tier.take_stats()["load", "damaged"] == 60
    assert caplog.text.count("a value is unusable") == 2
    assert caplog.text.count("its MAC does not match") == 1
    assert caplog.text.count("would keep it for ever") == 1


def extend(n: Neighbour) -> None:
    n.client.pexpire(n.name, DAY_S * 1000)


def test_a_longer_expiry_in_redis_extends_no_life(server, side, wall):
    extend(neighbour(server, side))
    wall.advance(299)
    assert side.get_exact(keys(1)).keys == {keys(1)[0]: 300}
    # The engines' clocks may be a minute apart, and nothing is served after that.
    wall.advance(2 + APART_S)
    assert side.get_exact(keys(1)).keys == {}
    assert side.tier.take_stats()["load", "damaged"] == 1
    wait_until(lambda: not server.client.exists(side.name(keys(1)[0])))


def test_a_value_that_was_put_aside_does_not_come_back(server, side, wall):
    attacker = neighbour(server, side)
    aside = attacker.value()
    server.client.delete(attacker.name)
    wall.advance(200)
    # Within its life, a genuine value is as good as the one that was deleted.
    attacker.swap_in(aside)
    assert side.get_exact(keys(1)).keys == {keys(1)[0]: 300}
    server.client.delete(attacker.name)
    wall.advance(101 + APART_S)
    attacker.swap_in(aside)
    assert side.get_exact(keys(1)).keys == {}


def test_an_earlier_lease_ends_earlier(server, side, wall):
    attacker = neighbour(server, side)
    lease = attacker.value()[HEADER_BYTES:FRONT_BYTES]
    wall.advance(200)
    side.use(keys(1), 300)
    wait_until(lambda: attacker.value()[HEADER_BYTES:FRONT_BYTES] != lease)
    server.client.setrange(attacker.name, HEADER_BYTES, lease)
    extend(attacker)
    wall.advance(99)
    assert side.get_exact(keys(1)).keys == {keys(1)[0]: 300}
    wall.advance(2 + APART_S)
    assert side.get_exact(keys(1)).keys == {}


@either
def test_a_use_renews_the_lease_without_writing_the_value(
    server, side, wall, start_engine_side, encrypt
):
    """Redis keeps the entry for ever in this test, as it were: here only the leases count."""
    other = start_engine_side(server.url, wall=wall, encrypt=encrypt)
    name = side.name(keys(1)[0])
    before = server.client.get(name)
    received = server.client.info()["total_net_input_bytes"]
    for engine in (other, side, other):
        wall.advance(200)
        # Without this use it would end in 100 s. Some pass, when much else goes on, before Redis is
        # told.
        end_ms = int((wall() + 240) * 1000)
        use_until(
            engine, keys(1), lambda end_ms=end_ms: lease_end(server, side, keys(1)[0]) >= end_ms
        )
    assert server.client.info()["total_net_input_bytes"] - received < SLOT
    after = server.client.get(name)
    assert after[:HEADER_BYTES] == before[:HEADER_BYTES]
    assert after[FRONT_BYTES:] == before[FRONT_BYTES:]
    # 600 s after it was stored for 300 s; the other value was not used.
    assert set(side.get_exact(keys(2)).keys) == {keys(2)[0]}
    server.client.pexpire(name, DAY_S * 1000)
    wall.advance(301 + APART_S)
    assert side.get_exact(keys(1)).keys == {}


def use_until(engine: EngineSide, used: list[bytes], condition: Callable[[], object]) -> None:
    """Use blocks until ``condition`` holds: a use that Redis is late to take is not told again."""
    for _ in range(5):
        engine.use(used, 300)
        with suppress(TimeoutError):
            return wait_until(condition, timeout_s=2)
    raise TimeoutError("no use renews it")


def lease_end(server: RedisServer, side: EngineSide, key: bytes) -> int:
    """Return when the lease of a key ends, in ms of Unix time."""
    lease = server.client.getrange(side.name(key), HEADER_BYTES, FRONT_BYTES - 1)
    end = Leases(SECRET).end(side.name(key), lease)
    assert end is not None
    return end


def test_a_shorter_use_takes_nothing_from_the_lease(server, side):
    ends = [lease_end(server, side, key) for key in keys(2)]
    side.use(keys(2)[:1], 10)
    side.use(keys(2)[1:], 600)
    wait_until(lambda: lease_end(server, side, keys(2)[1]) > ends[1] + 290_000)
    assert lease_end(server, side, keys(2)[0]) == ends[0]


def test_storing_what_is_there_renews_its_lease(server, side, wall, start_engine_side):
    wall.advance(200)
    start_engine_side(server.url, wall=wall).put(keys(2), ttl_s=300)
    wait_until(lambda: lease_end(server, side, keys(2)[1]) > (wall() + 290) * 1000)


def test_leases_are_renewed_on_a_full_server(server, side, wall):
    server.client.config_set("maxmemory-policy", "noeviction")
    server.client.config_set("maxmemory", 1)
    wall.advance(200)
    side.use(keys(2), 300)
    wait_until(lambda: lease_end(server, side, keys(2)[1]) > (wall() + 290) * 1000)
    assert side.tier.usable


@pytest.mark.parametrize("right", ["eval", "setrange"])
def test_a_user_who_may_not_renew_leases_is_told_so_at_once(server, start_engine_side, right):
    server.client.execute_command(f"ACL SETUSER kv on >pw ~cachescope:* +@all -{right}")
    side = start_engine_side(f"redis://kv:pw@127.0.0.1:{server.port}")
    assert "NOPERM" in side.tier.health()["reason"] and right in side.tier.health()["reason"]


@pytest.mark.parametrize("ahead_s", [-APART_S + 1, APART_S - 1])
def test_clocks_may_be_a_minute_apart(server, start_engine_side, wall, ahead_s):
    side = start_engine_side(server.url, wall=wall)
    other = start_engine_side(server.url, wall=lambda: wall() + ahead_s)
    side.put(keys(2), ttl_s=300)
    wall.advance(299)
    assert len(other.get_exact(keys(2)).keys) == 2
    other.use(keys(2), 301)
    wait_until(lambda: server.client.pttl(side.name(keys(2)[1])) > 300_000)
    wall.advance(300)
    assert len(side.get_exact(keys(2)).keys) == 2


def test_encrypted_blocks_are_read_by_engines_that_encrypt_and_by_no_others(
    server, start_engine_side
):
    one, other = (start_engine_side(server.url, encrypt=True) for _ in range(2))
    one.put(keys(20), ttl_s=300)
    assert other.get_exact(keys(20)).keys == dict.fromkeys(keys(20), 300)
    for key in keys(20):
        value, block = server.client.get(one.name(key)), content(key)
        assert len(value) == FRONT_BYTES + SLOT
        assert not any(block[i : i + 8] in value for i in range(0, SLOT, SLOT // 8))
    clear = start_engine_side(server.url)
    assert clear.get(keys(20)).keys == {}
    clear.put(keys(20))
    assert other.get_exact(keys(20)).keys == dict.fromkeys(keys(20), 300)
    assert clear.get_exact(keys(20)).keys == dict.fromkeys(keys(20), 300)


def test_entries_of_the_last_format_are_not_asked_for(server, side):
    name = side.name(keys(1)[0])
    server.client.rename(name, name.replace(b":%d:" % FORMAT, b":%d:" % (FORMAT - 1), 1))
    assert set(side.get_exact(keys(2)).keys) == {keys(2)[1]}
    assert side.tier.take_stats()["lookup", "miss"] == 1
