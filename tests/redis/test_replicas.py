"""Engines that share a Redis: what one has computed the other need not, and nothing else."""

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.engine.engine import BLOCK, BLOCK_BYTES, OWNERS, Ask, draw_tokens, plan, sealed
from tests.engine.samples import of_engine
from tests.redis.pair import GREEDY, GREEDY_BLOCKS, Pair, ask, running_pair
from tests.redis.replica import Replica
from tests.redis.servers import wait_until
from vllm_cachescope.cache.miss_causes import MissCause
from vllm_cachescope.metrics import PROMOTIONS, TIER_BYTES
from vllm_cachescope.tenancy.scope import Caller, Scope

pytestmark = pytest.mark.engine

DEADLINE = "2s"
"""Two engines compute on the same cores as their server: what is late is not what is tested."""


@pytest.fixture(scope="module")
def engines(tmp_path_factory) -> Iterator[Pair]:
    scratch = tmp_path_factory.mktemp("redis")
    with running_pair(scratch, load_deadline=DEADLINE, timeout="2s") as pair:
        yield pair


@pytest.fixture
def pair(engines: Pair) -> Pair:
    engines.fresh()
    return engines


def reference(engine: Replica, tokens: list[int]) -> list[int]:
    """Return what the model says to ``tokens`` without any cache."""
    return engine.call("uncached", tokens)


def stored(pair: Pair, blocks: int) -> None:
    """Wait until the server holds so many blocks."""
    wait_until(lambda: len(pair.names()) >= blocks)


def computed_by_a(pair: Pair, seed: int, blocks: int = 12) -> tuple[list[int], list[int]]:
    """Have the first engine compute a prompt; return it, and the model's answer."""
    tokens = draw_tokens(random.Random(seed), blocks * BLOCK + 7)
    there = len(pair.names())
    (answer,) = pair.a.run(ask(tokens))
    stored(pair, there + blocks)
    return tokens, answer.tokens


def test_the_second_engine_reads_what_the_first_one_computed(pair):
    tokens, expected = computed_by_a(pair, 1)
    (answer,) = pair.b.run(ask(tokens))
    assert answer.outcome("read_redis") == 12 * BLOCK
    assert answer.outcome("uncached") == 7
    assert answer.tokens == expected == reference(pair.b, tokens)
    # It is in its own memory now.
    (again,) = pair.b.run(ask(tokens))
    assert again.outcome("read_device") == 12 * BLOCK
    pair.b.call("empty_device")
    (again,) = pair.b.run(ask(tokens))
    assert again.outcome("read_cpu") == 12 * BLOCK
    assert again.tokens == expected


def test_the_metrics_have_what_was_moved(pair):
    engines = {"a": pair.a, "b": pair.b}
    before = {name: engine.call(of_engine, TIER_BYTES) for name, engine in engines.items()}
    promoted = pair.b.call(of_engine, PROMOTIONS)
    tokens, _ = computed_by_a(pair, 40)
    pair.b.run(ask(tokens))
    pair.b.call("empty_device")
    for engine in engines.values():
        engine.run(ask(tokens))
    moved = {
        name: Counter(engine.call(of_engine, TIER_BYTES)) - Counter(before[name])
        for name, engine in engines.items()
    }
    assert moved["a"]["redis", "store"] == 12 * BLOCK_BYTES
    assert moved["b"]["redis", "load"] == 12 * BLOCK_BYTES
    assert moved["b"]["cpu", "load"] == 24 * BLOCK_BYTES
    promoted = Counter(pair.b.call(of_engine, PROMOTIONS)) - Counter(promoted)
    assert promoted == {("redis", "cpu"): 12, ("cpu", "device"): 24}


def test_several_tiers_in_one_prompt(pair):
    tokens, _ = computed_by_a(pair, 2)
    longer = tokens + draw_tokens(random.Random(3), 4 * BLOCK)
    pair.b.run(ask(tokens[: 4 * BLOCK + 1]))
    (answer,) = pair.b.run(ask(longer))
    assert answer.outcome("read_device") == 4 * BLOCK
    assert answer.outcome("read_redis") == 8 * BLOCK
    assert answer.outcome("created") == 4 * BLOCK
    assert answer.tokens == reference(pair.a, longer)


def test_another_organisation_reads_nothing(pair):
    tokens, _ = computed_by_a(pair, 4)
    (answer,) = pair.b.run(ask(tokens, org="other"))
    assert answer.read == 0
    assert answer.outcome("created") == 12 * BLOCK


def test_what_no_breakpoint_covers_is_not_shared(pair):
    tokens = draw_tokens(random.Random(5), 8 * BLOCK)
    params = sealed(
        plan(Caller("acme"), (4 * BLOCK, Scope.ORG, 300), (len(tokens), Scope.ORG, 300, False))
    )
    pair.a.run(Ask(tokens, params))
    stored(pair, 4)
    time.sleep(0.1)
    assert len(pair.names()) == 4


def test_an_engine_is_killed_in_the_middle_of_traffic(pair):
    """Its sessions are read by the other one, whose replies do not suffer; so does the engine that
    comes in its place."""
    chance = random.Random(6)
    sessions = [draw_tokens(chance, blocks * BLOCK + 7) for blocks in (4, 8, 12)]
    expected = [answer.tokens for answer in pair.b.run(*(ask(tokens) for tokens in sessions))]
    stored(pair, 24)
    # Neither of these is read by anyone afterwards: what was being stored may be there or not.
    lost = [draw_tokens(chance, 20 * BLOCK) for _ in range(2)]
    pair.b.begin(*(ask(tokens) for tokens in lost))
    own = [draw_tokens(chance, 6 * BLOCK + 1) for _ in range(3)]
    begun = pair.a.begin(*(ask(tokens) for tokens in [*own, *sessions]))
    pair.b.stop()
    answers = pair.a.wait(*begun)
    for answer, tokens, blocks in zip(answers[3:], expected, (4, 8, 12), strict=True):
        assert answer.tokens == tokens
        assert answer.outcome("read_redis") == blocks * BLOCK
    for answer, tokens in zip(answers, own, strict=False):
        assert answer.tokens == reference(pair.a, tokens)
    for tokens in lost:
        (answer,) = pair.a.run(ask(tokens))
        assert answer.tokens == reference(pair.a, tokens)
        assert MissCause.UNKNOWN not in {miss.cause for miss in answer.report.misses}
    pair.replace_b()
    answers = pair.b.run(*(ask(tokens) for tokens in sessions))
    assert [answer.tokens for answer in answers] == expected
    assert sum(answer.outcome("read_redis") for answer in answers) == 24 * BLOCK


def test_isolation_by_random_schedules(pair):
    """3 organisations with 4 sessions each ask the same on both engines. Nobody reads a block
    that nobody who shares its scope has computed before, and every answer is exact."""
    chance = random.Random(8)
    prompts = [draw_tokens(chance, 6 * BLOCK + 1) for _ in range(2)]
    expected = [reference(pair.a, tokens) for tokens in prompts]
    known: set[tuple[int, int, tuple[str, ...]]] = set()
    across = 0
    last_engine: dict[tuple[int, int, tuple[str, ...]], int] = {}
    for step in range(72):
        org, session = f"org{chance.randrange(3)}", f"session{chance.randrange(4)}"
        which, engine = chance.randrange(2), chance.randrange(2)
        caller = Caller(org, session)
        cuts = (
            (2 * BLOCK, Scope.GLOBAL, 3600),
            (4 * BLOCK, Scope.ORG, 300),
            (6 * BLOCK + 1, Scope.SESSION, 300),
        )
        holders: list[tuple[str, ...]] = [(), (), (org,), (org,), (org, session), (org, session)]
        blocks = [(which, i, holder) for i, holder in enumerate(holders)]
        (answer,) = (pair.a, pair.b)[engine].run(Ask(prompts[which], sealed(plan(caller, *cuts))))
        allowed = next((i for i, block in enumerate(blocks) if block not in known), 6)
        assert answer.read <= allowed * BLOCK, (step, org, session)
        assert answer.tokens == expected[which]
        read = answer.read // BLOCK
        across += any(last_engine[block] != engine for block in blocks[:read])
        known.update(blocks)
        last_engine |= dict.fromkeys(blocks, engine)
        if step % 9 == 0:
            (pair.a, pair.b)[1 - engine].call("empty_device")
    assert across > 10


def test_a_use_on_one_engine_lets_an_entry_live_on_for_the_other(pair):
    tokens, _ = computed_by_a(pair, 9)
    client = pair.server.client
    names = pair.names()
    for name in names:
        client.pexpire(name, 30_000)
    # Read from the first engine's own device: Redis hears of it all the same.
    (answer,) = pair.a.run(ask(tokens))
    assert answer.outcome("read_device") == 12 * BLOCK
    wait_until(lambda: all(client.pttl(name) > 290_000 for name in names))


def test_an_expired_entry_is_a_miss_for_both(pair):
    tokens, expected = computed_by_a(pair, 10)
    client = pair.server.client
    assert all(0 < client.pttl(name) <= 300_000 for name in pair.names())
    for name in pair.names():
        client.pexpire(name, 1)
    wait_until(lambda: not pair.names())
    pair.a.call("advance", 301.0)
    for engine in (pair.a, pair.b):
        (answer,) = engine.run(ask(tokens))
        assert answer.tokens == expected
        if engine is pair.a:
            assert answer.read == 0
            client.flushall()
        else:
            assert answer.outcome("read_redis") == 0


@pytest.mark.parametrize("skew_s", [3600.0, -3600.0])
def test_a_replica_whose_time_of_day_is_wrong(pair, skew_s):
    """The server keeps the time: nothing is served for longer, and nothing for shorter."""
    client = pair.server.client
    pair.b.call("skew", skew_s)
    try:
        tokens, expected = computed_by_a(pair, 21 if skew_s > 0 else 22)
        (answer,) = pair.b.run(ask(tokens))
        assert answer.outcome("read_redis") == 12 * BLOCK
        assert answer.tokens == expected
        # What it uses or stores itself has the lifetime it should have.
        (own,) = pair.b.run(ask(draw_tokens(random.Random(23), 2 * BLOCK + 1), ttl_s=300))
        assert own.outcome("created") == 2 * BLOCK
        stored(pair, 14)
        assert all(290_000 < client.pttl(name) <= 300_000 for name in pair.names())
        for name in pair.names():
            client.pexpire(name, 1)
        wait_until(lambda: not pair.names())
        pair.b.call("empty")
        (answer,) = pair.b.run(ask(tokens))
        assert answer.read == 0
        assert answer.tokens == expected
    finally:
        pair.b.call("skew", 0.0)


def test_entries_of_an_hour_stay_entries_of_an_hour(pair):
    """A prompt that asks for five minutes reads them, and takes nothing away."""
    tokens = draw_tokens(random.Random(11), 6 * BLOCK + 7)
    pair.a.run(ask(tokens, ttl_s=3600))
    stored(pair, 6)
    (answer,) = pair.b.run(ask(tokens, ttl_s=300))
    assert answer.outcome("read_redis") == 6 * BLOCK
    assert ("cpu", 3600) in pair.b.call("resident")
    client = pair.server.client
    assert all(client.pttl(name) > 3_500_000 for name in pair.names())


def test_a_purge_on_one_engine_empties_both_and_the_store(pair):
    tokens, expected = computed_by_a(pair, 13)
    other, _ = computed_by_a(pair, 14, blocks=3)
    zetas = draw_tokens(random.Random(15), 2 * BLOCK)
    pair.a.run(ask(zetas, org="zeta"))
    stored(pair, 17)
    pair.b.run(ask(other))
    # Each engine knows what it has itself; what is in the store belongs to both.
    assert pair.b.call("command_purge", OWNERS.prefix("acme"), "p") == {"device": 3, "cpu": 3}
    assert pair.purged(pair.b, "p")["tiers"] == {"redis": (15, None)}
    assert len(pair.names()) == 2
    (answer,) = pair.b.run(ask(tokens))
    assert (answer.read, answer.tokens) == (0, expected)
    (answer,) = pair.b.run(ask(zetas, org="zeta"))
    assert answer.outcome("read_redis") == 2 * BLOCK
    assert pair.a.call("command_purge", OWNERS.prefix("acme"), "p") == {"device": 0, "cpu": 0}


def test_a_purge_says_which_tier_it_did_not_reach(pair):
    computed_by_a(pair, 16, blocks=2)
    pair.server.kill()
    try:
        pair.a.call("command_purge", OWNERS.prefix("acme"), "p")
        wait_until(lambda: pair.a.call("command_purged", "p"))
        entries, reason = pair.a.call("command_purged", "p")["tiers"]["redis"]
        assert entries == 0 and reason
    finally:
        pair.server.start()


def test_engines_share_a_quota(pair):
    """What one engine stores counts for the other one, too."""
    quiet, _ = computed_by_a(pair, 17, blocks=4)
    floods = [draw_tokens(random.Random(18 + i), 3 * BLOCK + 1) for i in range(6)]
    for i, tokens in enumerate(floods):
        before = set(pair.names())
        (pair.a, pair.b)[i % 2].run(ask(tokens, org=GREEDY))
        wait_until(lambda before=before: len(set(pair.names()) - before) == 3)
        wait_until(lambda: len(pair.names()) <= 4 + GREEDY_BLOCKS)
    assert len(pair.names()) == 4 + GREEDY_BLOCKS
    for engine in (pair.a, pair.b):
        engine.call("empty")
    # The last two whole, of the one before its beginning.
    for i, blocks in ((5, 3), (4, 3), (3, 2)):
        (answer,) = pair.b.run(ask(floods[i], org=GREEDY))
        assert answer.outcome("read_redis") == blocks * BLOCK
        assert answer.tokens == reference(pair.b, floods[i])
    (answer,) = pair.b.run(ask(quiet))
    assert answer.outcome("read_redis") == 4 * BLOCK


def test_of_a_prompt_longer_than_its_quota_the_beginning_is_kept(pair):
    """It is computed, and stored, in many steps; what would have to go at once is not stored."""
    quiet, _ = computed_by_a(pair, 17, blocks=4)
    tokens = draw_tokens(random.Random(30), 3 * GREEDY_BLOCKS * BLOCK + 1)
    pair.a.run(ask(draw_tokens(random.Random(31), 3 * BLOCK + 1), org=GREEDY))
    wait_until(lambda: len(pair.names()) == 4 + 3)
    before = set(pair.names())
    sent = pair.server.client.info()["total_net_input_bytes"]
    pair.a.run(ask(tokens, org=GREEDY))
    wait_until(lambda: len(set(pair.names()) - before) == GREEDY_BLOCKS)
    for engine in (pair.a, pair.b):
        engine.call("empty")
    (answer,) = pair.b.run(ask(tokens, org=GREEDY))
    assert answer.outcome("read_redis") == GREEDY_BLOCKS * BLOCK
    assert answer.tokens == reference(pair.b, tokens)
    (answer,) = pair.b.run(ask(quiet))
    assert answer.outcome("read_redis") == 4 * BLOCK
    assert len(pair.names()) == 4 + GREEDY_BLOCKS
    sent = pair.server.client.info()["total_net_input_bytes"] - sent
    assert GREEDY_BLOCKS <= sent / BLOCK_BYTES < GREEDY_BLOCKS + 1


def test_what_everyone_shares_leaves_an_organisation_its_quota(pair):
    tokens = draw_tokens(random.Random(32), (6 + GREEDY_BLOCKS) * BLOCK + 1)
    cuts = ((6 * BLOCK, Scope.GLOBAL, 300), (len(tokens), Scope.ORG, 300))
    caller = Caller(GREEDY)
    pair.a.run(Ask(tokens, sealed(plan(caller, *cuts))))
    wait_until(lambda: len(pair.names()) == 6 + GREEDY_BLOCKS)
    (answer,) = pair.b.run(Ask(tokens, sealed(plan(caller, *cuts))))
    assert answer.outcome("read_redis") == len(tokens) - 1


@pytest.mark.parametrize(
    "fault", ["killed", "hangs", "restarted", "flushed", "full", "denied", "drips", "cut"]
)
def test_faults_while_requests_run(pair, fault):
    """Whatever happens to the server, every answer is exact and comes."""
    chance = random.Random(fault)
    texts = [computed_by_a(pair, chance.randrange(10**6)) for _ in range(4)]
    mean = {
        "killed": pair.server.kill,
        "hangs": pair.server.stop,
        "restarted": lambda: (pair.server.kill(), pair.server.start()),
        "flushed": pair.server.client.flushall,
        "full": lambda: pair.server.client.config_set("maxmemory", 1),
        "denied": lambda: pair.server.client.execute_command("ACL SETUSER default resetkeys"),
        "drips": lambda: vars(pair.proxy).update(chunk=3000, pause_s=0.01),
        "cut": lambda: vars(pair.proxy).update(cut_after=100_000),
    }[fault]
    trouble = threading.Timer(chance.uniform(0, 0.02), mean)
    trouble.start()
    for tokens, expected in texts:
        fresh = draw_tokens(chance, 3 * BLOCK)
        known, new = pair.b.run(ask(tokens), ask(fresh))
        assert known.tokens == expected
        assert new.tokens == reference(pair.a, fresh)
    trouble.join()
    if fault == "killed":
        pair.server.start()
    pair.fresh()
    tokens, expected = computed_by_a(pair, 12)
    (answer,) = pair.b.run(ask(tokens))
    assert answer.outcome("read_redis") == 12 * BLOCK
    assert answer.tokens == expected
