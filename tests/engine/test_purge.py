"""A purge forgets just what it names, on every tier, whatever runs meanwhile."""

import random
from types import SimpleNamespace

import pytest

from tests.engine.engine import BLOCK, CPU_CHUNKS, OWNERS, Ask, draw_tokens, org_plan, plan, sealed
from vllm_cachescope.connectors.vllm.engine.prompts import Prompt
from vllm_cachescope.tenancy.scope import Caller, Scope

pytestmark = pytest.mark.engine

CALLERS = [Caller("acme", "s1"), Caller("acme", "s2"), Caller("zeta", "s1")]
GLOBAL, ORG, SESSION = 2, 3, 4
"""Blocks of a prompt with each scope."""


def mixed(caller: Caller, tokens: list[int]):
    ends = (GLOBAL * BLOCK, (GLOBAL + ORG) * BLOCK, len(tokens))
    return plan(caller, *((end, scope, 300) for end, scope in zip(ends, Scope, strict=True)))


@pytest.fixture
def prompt(request) -> list[int]:
    return draw_tokens(random.Random(request.node.name), (GLOBAL + ORG + SESSION) * BLOCK + 7)


def purge(engine, prefix: bytes) -> dict[str, int]:
    entries = engine.connector.command_purge(prefix, "the tests'")
    assert engine.connector.command_purged("the tests'")["tiers"] == {}
    return entries


@pytest.mark.parametrize("tier", ["device", "cpu"])
@pytest.mark.parametrize(
    ("prefix", "forgotten", "left"),
    [
        (OWNERS.prefix("acme", "s1"), SESSION, [GLOBAL + ORG, 9, 9]),
        (OWNERS.prefix("acme"), ORG + 2 * SESSION, [GLOBAL, GLOBAL + ORG, 9]),
        (OWNERS.prefix("global"), GLOBAL, [0, 9, 9]),
        (b"", GLOBAL + 2 * ORG + 3 * SESSION, [0, GLOBAL + ORG, GLOBAL]),
        (OWNERS.prefix("nobody we know"), 0, [9, 9, 9]),
    ],
    ids=["session", "org", "global", "all", "nobody"],
)
def test_just_what_is_named_is_forgotten(engine, prompt, tier, prefix, forgotten, left):
    expected = engine.uncached(prompt)
    engine.empty()
    for caller in CALLERS:
        engine.ask(prompt, mixed(caller, prompt), max_tokens=1)
    whole = engine.resident()
    if tier == "cpu":
        engine.empty_device()
    on_device = forgotten if tier == "device" else 0
    assert purge(engine, prefix) == {"device": on_device, "cpu": forgotten}
    assert engine.resident().get(("cpu", 300), 0) == whole["cpu", 300] - forgotten
    assert purge(engine, prefix) == {"device": 0, "cpu": 0}
    for caller, blocks in zip(CALLERS, left, strict=True):
        # Each one reads what those before it have computed again, too.
        answer = engine.ask(prompt, mixed(caller, prompt))
        assert answer.tokens == expected
        assert answer.read == blocks * BLOCK, caller


def test_memory_is_given_back_at_once(engine, prompt):
    free = engine.free_chunks()
    cached = engine.scheduler.kv_cache_manager.block_pool.cached_block_hash_to_block
    engine.ask(prompt, org_plan("acme", prompt))
    assert purge(engine, OWNERS.prefix("acme")) == {"device": 9, "cpu": 9}
    assert engine.free_chunks() == free
    assert len(cached) == 0


def test_requests_under_way_go_on_and_leave_nothing_behind(engine):
    """Purged at every step of a request, from the first to the last."""
    chance = random.Random(3)
    tokens = draw_tokens(chance, 8 * BLOCK + 30)
    expected = engine.uncached(tokens, max_tokens=2 * BLOCK)
    bystander = draw_tokens(chance, 4 * BLOCK + 1)
    engine.ask(bystander, org_plan("zeta", bystander))
    for steps in (1, 2, 3, 4, 5, 20, 120, 10**6):
        request = engine.add(Ask(tokens, sealed(org_plan("acme", tokens)), max_tokens=2 * BLOCK))
        running = True
        while running and steps:
            running, steps = engine.step(), steps - 1
        purge(engine, OWNERS.prefix("acme"))
        while running:
            running = engine.step()
        assert engine.answer(request).tokens == expected
        # What is stored after a request's end is stored in a further step.
        engine.ask(draw_tokens(chance, 20), org_plan("other", [0] * 20))
        assert purge(engine, OWNERS.prefix("acme")) == {"device": 0, "cpu": 0}
    assert engine.ask(bystander, org_plan("zeta", bystander)).read == 4 * BLOCK
    # A purge is over when it is over: what comes later is kept.
    engine.ask(tokens, org_plan("acme", tokens))
    assert engine.ask(tokens, org_plan("acme", tokens)).read == 8 * BLOCK


def test_a_prompt_that_waits_when_its_blocks_are_purged(engine):
    """It was found on the CPU tier, is being loaded, and the purge comes in between."""
    tokens = draw_tokens(random.Random(4), 8 * BLOCK + 30)
    expected = engine.ask(tokens, org_plan("acme", tokens)).tokens
    engine.empty_device()
    request = engine.add(Ask(tokens, sealed(org_plan("acme", tokens))))
    running = engine.step()
    purge(engine, OWNERS.prefix("acme"))
    while running:
        running = engine.step()
    assert engine.answer(request).tokens == expected
    engine.connector.command_sweep()
    assert engine.resident() == {}
    pool = engine.scheduler.kv_cache_manager.block_pool
    assert len(pool.cached_block_hash_to_block) == 0
    assert engine.free_chunks() == CPU_CHUNKS


def test_a_purge_is_noted_only_where_it_has_something_to_purge(engine, prompt):
    """Twenty thousand purges must cost the next step nothing."""
    running = Prompt(mixed(CALLERS[0], prompt), None)
    for i in range(20_000):
        running.purge(OWNERS.prefix("zeta", f"made up {i}"))
        running.purge(OWNERS.prefix("acme", f"made up {i}"))
    assert running.purged == set()
    running.purge(OWNERS.prefix("acme", "s1"))
    assert running.purged == {Scope.SESSION}
    running.purge(b"")
    assert running.purged == set(Scope)
    ends = [GLOBAL * BLOCK, len(prompt)]
    assert all(map(running.is_purged, ends))


def test_a_purge_that_is_not_known_any_more_is_not_over(engine):
    """With a remote tier, whose entries nobody can answer for."""
    remotes = engine.connector.cachescope.remotes
    remotes.append(SimpleNamespace(name="redis"))
    try:
        answer = engine.connector.command_purged("long ago")["tiers"]
    finally:
        remotes.clear()
    assert answer is not None and "purge again" in answer["redis"][1]


def test_what_was_purged_is_known_to_have_been(engine, prompt):
    engine.ask(prompt, org_plan("acme", prompt))
    engine.clock.advance(10)
    purge(engine, OWNERS.prefix("acme"))
    engine.clock.advance(5)
    (miss,) = engine.ask(prompt, org_plan("acme", prompt)).report.misses
    assert (miss.cause, miss.detail) == ("evicted", "it was purged")
    assert (miss.tokens, miss.age_s) == (9 * BLOCK, 5)


def test_health_tells_what_each_tier_holds_and_for_whom(engine, prompt):
    for caller in CALLERS:
        engine.ask(prompt, mixed(caller, prompt), max_tokens=1)
    device, cpu = engine.connector.command_health()
    assert (device["name"], cpu["name"]) == ("device", "cpu")
    assert cpu["address"].startswith("/dev/shm/") and device["address"]
    for tier in (device, cpu):
        assert tier["up"]
        entry = tier["capacity_bytes"] // {"device": 63, "cpu": 128}[tier["name"]]
        assert tier["orgs"] == {
            OWNERS.prefix("acme").hex(): (ORG + 2 * SESSION) * entry,
            OWNERS.prefix("zeta").hex(): (ORG + SESSION) * entry,
            OWNERS.prefix("global").hex(): GLOBAL * entry,
        }
        assert tier["used_bytes"] == sum(tier["orgs"].values())
