"""One tenant cannot flush the others: over its quota its own oldest blocks go first, and what is
reserved for another stays."""

import random
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256

import pytest

from tests.engine.engine import (
    BLOCK,
    BLOCK_BYTES,
    OWNERS,
    Answer,
    Ask,
    draw_tokens,
    org_plan,
    plan,
    sealed,
)
from tests.engine.samples import of_engine
from tests.redis.replica import Replica
from vllm_cachescope.connectors.vllm import shm_regions
from vllm_cachescope.metrics import QUOTA_USED
from vllm_cachescope.tenancy.scope import Caller, Scope

pytestmark = pytest.mark.engine

QUOTA = {"device": 20, "cpu": 15}
RESERVE = {"device": 12, "cpu": 10}
CPU_CHUNKS = 40
CALM = "name:calm"
"""Has reserves; everyone else has quotas."""

BLOCKS = 5
"""Blocks per prompt."""


def share(tier: str) -> dict[str, object]:
    calm = {"quota": 100 * BLOCK_BYTES, "reserve": RESERVE[tier] * BLOCK_BYTES}
    return {"quota": QUOTA[tier] * BLOCK_BYTES, "orgs": {"calm": calm}}


@pytest.fixture(scope="module")
def replica(tiny_model, tmp_path_factory) -> Iterator[Replica]:
    config = {
        "quotas": {tier: share(tier) for tier in ("device", "cpu")},
        "tenants": {sha256(b"a key").hexdigest(): "calm"},
    }
    scratch = tmp_path_factory.mktemp("quotas")
    replica = Replica(tiny_model, scratch, config, cpu_chunks=CPU_CHUNKS)
    yield replica
    replica.stop()
    shm_regions.remove_stale()


@pytest.fixture
def engine(replica: Replica) -> Replica:
    replica.call("empty")
    return replica


def prompts(chance: random.Random, count: int, blocks: int = BLOCKS) -> list[list[int]]:
    return [draw_tokens(chance, blocks * BLOCK + 3) for _ in range(count)]


def ask(engine: Replica, org: str, tokens: list[int]) -> Answer:
    """Have ``org`` ask for ``tokens``, and make sure that the answer is exact."""
    (answer,) = engine.run(Ask(tokens, sealed(org_plan(org, tokens))))
    return answer


def exact(engine: Replica, org: str, tokens: list[int]) -> Answer:
    answer = ask(engine, org, tokens)
    assert answer.tokens == engine.call("uncached", tokens)
    return answer


def held(engine: Replica, tier: str, org: str) -> int:
    """Return how many blocks of ``org`` a tier holds."""
    health = {state["name"]: state for state in engine.call("command_health")}
    return health[tier]["orgs"].get(OWNERS.prefix(org).hex(), 0) // BLOCK_BYTES


@pytest.mark.parametrize("tier", ["device", "cpu"])
def test_a_flood_washes_away_nothing_but_itself(engine, chance, tier):
    quiet, flood = prompts(chance, 2), prompts(chance, 30)
    for tokens in quiet:
        ask(engine, "quiet", tokens)
    for tokens in flood:
        ask(engine, "flood", tokens)
        assert held(engine, tier, "flood") <= QUOTA[tier] + BLOCKS
    assert held(engine, tier, "quiet") == 2 * BLOCKS
    if tier == "cpu":
        engine.call("empty_device")
    for tokens in quiet:
        answer = exact(engine, "quiet", tokens)
        assert answer.outcome(f"read_{tier}") == BLOCKS * BLOCK
    # Of its own, the flood keeps the latest.
    reads = [exact(engine, "flood", tokens).outcome(f"read_{tier}") for tokens in flood[-1:-5:-1]]
    assert reads[0] == BLOCKS * BLOCK
    assert reads == sorted(reads, reverse=True)
    assert exact(engine, "flood", flood[0]).read == 0


def test_who_evicts_whose_blocks_is_counted(engine, chance):
    """Three organisations within their quotas are too many for the tier together."""
    orgs = [f"pushing {number}" for number in range(4)]
    tags = {OWNERS.prefix(org): org for org in orgs}
    engine.call("command_evictions")
    for org in orgs[:3]:
        for tokens in prompts(chance, 3):
            ask(engine, org, tokens)
    first = parts(engine, "cpu", tags)
    assert first["caused", orgs[2]] == first["suffered", orgs[0]] == 3 * 3 * BLOCKS - CPU_CHUNKS
    assert not any(part == "own" for part, _ in first)
    # One that is over its quota makes room for itself.
    for tokens in prompts(chance, 2):
        ask(engine, orgs[2], tokens)
    again = parts(engine, "cpu", tags)
    assert set(again) == {("own", orgs[2])} and again["own", orgs[2]] >= 2 * BLOCKS
    assert parts(engine, "cpu", tags) == {}


def test_who_evicts_whose_blocks_from_the_device_is_counted(engine, chance):
    orgs = [f"crowding {number}" for number in range(40)]
    engine.call("command_evictions")
    for org in orgs:
        for tokens in prompts(chance, 3):
            ask(engine, org, tokens)
    engine.call("command_sweep")
    found = parts(engine, "device", {OWNERS.prefix(org): org for org in orgs})
    suffered, caused = (
        {org: n for (part, org), n in found.items() if part == which}
        for which in ("suffered", "caused")
    )
    assert sum(suffered.values()) == sum(caused.values()) > 0
    # The first to come suffer first, and the last cause it.
    assert orgs[0] in suffered and orgs[-1] not in suffered
    assert orgs[-1] in caused and orgs[0] not in caused


def parts(engine: Replica, tier: str, tags: dict[bytes, str]) -> dict[tuple[str, str], int]:
    """Return how many entries left a tier since the last time, by part and organisation."""
    return {
        (part, tags.get(tag, "unknown")): entries
        for name, part, tag, entries in engine.call("command_evictions")
        if name == tier
    }


def test_the_fullest_quota_shows(engine, chance):
    def used() -> dict[tuple[str, ...], float]:
        engine.call("command_sweep")
        ask(engine, "passing by", prompts(chance, 1, 1)[0])
        return engine.call(of_engine, QUOTA_USED)

    ask(engine, "flood", prompts(chance, 1)[0])
    assert used() == {(tier,): BLOCKS / quota for tier, quota in QUOTA.items()}
    for tokens in prompts(chance, 8):
        ask(engine, "flood", tokens)
    assert used() == {(tier,): 1.0 for tier in QUOTA}


def test_a_miss_says_that_the_quota_was_full(engine, chance):
    flood = prompts(chance, 8)
    for tokens in flood:
        ask(engine, "flood", tokens)
    misses = ask(engine, "flood", flood[0]).report.misses
    told = {(miss.cause, miss.detail) for miss in misses}
    assert told == {("evicted", "the organisation's quota was full")}
    assert engine.call("counter", "cachescope_evictions", "quota") > 0


@pytest.mark.parametrize("tier", ["device", "cpu"])
def test_what_is_reserved_stays_though_everyone_keeps_to_a_quota(engine, chance, tier):
    calm, (earlier,) = prompts(chance, 2), prompts(chance, 1)
    for tokens in calm:
        ask(engine, CALM, tokens)
    ask(engine, "earlier", earlier)
    for i in range(12):
        for tokens in prompts(chance, 2):
            ask(engine, f"neighbour {i}", tokens)
    assert held(engine, tier, "earlier") == 0
    assert held(engine, tier, CALM) == 2 * BLOCKS
    if tier == "cpu":
        engine.call("empty_device")
    for tokens in calm:
        assert exact(engine, CALM, tokens).outcome(f"read_{tier}") == BLOCKS * BLOCK
    # Beyond its reserve it is like the others.
    ask(engine, CALM, prompts(chance, 1, 20)[0])
    for i in range(12):
        for tokens in prompts(chance, 2):
            ask(engine, f"neighbour {i}", tokens)
    assert 0 < held(engine, tier, CALM) <= RESERVE[tier]


def test_many_requests_of_one_organisation_at_once(engine, chance):
    """What runs cannot go; once it is over the quota is kept again."""
    (quiet,) = prompts(chance, 1)
    ask(engine, "quiet", quiet)
    flood = prompts(chance, 8, 6)
    expected = [engine.call("uncached", tokens) for tokens in flood]
    ask(engine, "quiet", quiet)
    answers = engine.run(*[Ask(t, sealed(org_plan("flood", t))) for t in flood])
    assert [answer.tokens for answer in answers] == expected
    assert ask(engine, "quiet", quiet).read == BLOCKS * BLOCK
    engine.call("command_sweep")
    for tier in QUOTA:
        assert held(engine, tier, "flood") <= QUOTA[tier]


def test_a_prompt_larger_than_the_quota(engine, chance):
    (quiet,), (large,) = prompts(chance, 1), prompts(chance, 1, 28)
    ask(engine, "quiet", quiet)
    for _ in range(3):
        exact(engine, "flood", large)
    # Its beginning is what is kept, on each tier.
    assert ask(engine, "flood", large).outcome("read_device") == QUOTA["device"] * BLOCK
    engine.call("empty_device")
    assert exact(engine, "flood", large).outcome("read_cpu") == QUOTA["cpu"] * BLOCK
    assert ask(engine, "quiet", quiet).read == BLOCKS * BLOCK


def test_what_everyone_shares_leaves_an_organisation_its_quota(engine, chance):
    (tokens,) = prompts(chance, 1, 26)
    both = ((13 * BLOCK, Scope.GLOBAL, 300), (len(tokens), Scope.ORG, 300))
    for _ in range(2):
        engine.call("empty_device")
        (answer,) = engine.run(Ask(tokens, sealed(plan(Caller("long"), *both))))
    assert answer.outcome("read_cpu") == 26 * BLOCK


def test_what_everyone_shares_counts_as_one_organisations(engine, chance):
    (quiet,) = prompts(chance, 1)
    ask(engine, "quiet", quiet)
    for tokens in prompts(chance, 20):
        everyones = plan(Caller("flood"), (len(tokens), Scope.GLOBAL, 300))
        engine.run(Ask(tokens, sealed(everyones)))
    assert held(engine, "device", "global") <= QUOTA["device"]
    assert held(engine, "cpu", "global") <= QUOTA["cpu"]
    assert ask(engine, "quiet", quiet).read == BLOCKS * BLOCK


@pytest.mark.parametrize("tier", ["device", "cpu"])
def test_organisations_that_anyone_can_make_up_share_one_quota(engine, chance, tier):
    (quiet,) = prompts(chance, 1)
    ask(engine, "quiet", quiet)
    made_up = [f"key:{i}" for i in range(12)]
    for org in made_up:
        (tokens,) = prompts(chance, 1)
        owner = OWNERS.of(Caller(org), is_listed=False)
        engine.run(Ask(tokens, sealed(replace(org_plan(org, tokens), owner=owner))))
    tags = [OWNERS.prefix(org, is_listed=False).hex() for org in made_up]
    health = {state["name"]: state["orgs"] for state in engine.call("command_health")}
    held_together = sum(health[tier].get(tag, 0) for tag in tags) // BLOCK_BYTES
    assert QUOTA[tier] - BLOCKS < held_together <= QUOTA[tier]
    assert held(engine, tier, "quiet") == BLOCKS


def test_a_writer_keeps_what_another_writer_cannot_push_out(engine, chance):
    """Each has the quota of what everyone shares for itself."""
    (handbook,) = prompts(chance, 1)

    def share(org: str, tokens: list[int]) -> Answer:
        everyones = plan(Caller(org), (len(tokens), Scope.GLOBAL, 300))
        (answer,) = engine.run(Ask(tokens, sealed(everyones)))
        return answer

    share("one", handbook)
    for tokens in prompts(chance, 20):
        share("other", tokens)
    assert share("third", handbook).outcome("read_device") == BLOCKS * BLOCK
    engine.call("empty_device")
    assert share("third", handbook).outcome("read_cpu") == BLOCKS * BLOCK


def test_random_tenants_under_quotas(engine, chance):
    """Whatever goes and stays, every answer is exact and nobody reads more than it has written."""
    texts = prompts(chance, 4) + prompts(chance, 2, 12)
    expected = [engine.call("uncached", tokens) for tokens in texts]
    written: set[tuple[str, int]] = set()
    read = 0
    for step in range(40):
        batch = [
            (chance.choice(["a", "b", "c", CALM]), chance.randrange(len(texts)))
            for _ in range(chance.randrange(1, 6))
        ]
        if step % 10 == 9:
            engine.call("empty_device")
        answers = engine.run(*[Ask(texts[i], sealed(org_plan(org, texts[i]))) for org, i in batch])
        for (org, i), answer in zip(batch, answers, strict=True):
            assert answer.tokens == expected[i]
            assert answer.read == 0 or (org, i) in written or batch.count((org, i)) > 1
            read += answer.read
        written.update(batch)
    assert read > 50 * BLOCK
