"""After its lifetime a block is a miss on every tier, and a use starts the lifetime again."""

import random
import signal
from contextlib import contextmanager

import pytest

from tests.engine.engine import (
    BLOCK,
    CPU_CHUNKS,
    MAX_REQUESTS,
    Ask,
    draw_tokens,
    org_plan,
    plan,
    sealed,
)
from vllm_cachescope.config.eviction import EvictionSettings
from vllm_cachescope.tenancy.scope import Caller, Scope

pytestmark = pytest.mark.engine

PROMPT = 1000
READABLE = PROMPT // BLOCK * BLOCK
TIERS = pytest.mark.parametrize("tier", ["device", "cpu"])


@pytest.fixture
def prompt(request):
    return draw_tokens(random.Random(request.node.name), PROMPT)


def leave_on(engine, tier):
    """Have the next look-up find blocks on ``tier`` only."""
    if tier == "cpu":
        engine.empty_device()


@TIERS
def test_a_block_expires_though_nothing_has_run_in_between(engine, prompt, tier):
    engine.ask(prompt, org_plan("acme", prompt))
    leave_on(engine, tier)
    engine.clock.advance(299.9)
    answer = engine.ask(prompt, org_plan("acme", prompt))
    assert answer.outcome(f"read_{tier}") == READABLE

    leave_on(engine, tier)
    engine.clock.advance(300)
    answer = engine.ask(prompt, org_plan("acme", prompt))
    assert answer.read == 0
    assert answer.outcome("created") == READABLE


@TIERS
def test_each_use_starts_the_lifetime_again(engine, prompt, tier):
    engine.ask(prompt, org_plan("acme", prompt))
    for _ in range(3):
        leave_on(engine, tier)
        engine.clock.advance(200)
        answer = engine.ask(prompt, org_plan("acme", prompt))
        assert answer.outcome(f"read_{tier}") == READABLE


@pytest.mark.parametrize("first, second", [("device", "cpu"), ("cpu", "device")])
def test_a_use_on_one_tier_refreshes_the_other(engine, prompt, first, second):
    engine.ask(prompt, org_plan("acme", prompt))
    for tier in (first, second):
        leave_on(engine, tier)
        engine.clock.advance(200)
        assert engine.ask(prompt, org_plan("acme", prompt)).outcome(f"read_{tier}") == READABLE


def test_what_was_loaded_from_memory_expires_on_the_device(engine, prompt):
    engine.ask(prompt, org_plan("acme", prompt))
    engine.empty_device()
    assert engine.ask(prompt, org_plan("acme", prompt)).outcome("read_cpu") == READABLE
    assert engine.resident()["device", 300] == READABLE // BLOCK
    engine.clock.advance(300)
    assert engine.ask(prompt, org_plan("acme", prompt)).read == 0


@TIERS
def test_the_long_lived_beginning_outlives_its_short_lived_neighbour(engine, prompt, tier):
    def mixed():
        return plan(Caller("acme"), (384, Scope.GLOBAL, 3600), (PROMPT, Scope.ORG, 300))

    engine.ask(prompt, mixed())
    leave_on(engine, tier)
    engine.clock.advance(300)
    assert engine.ask(prompt, mixed()).outcome(f"read_{tier}") == 384
    engine.clock.advance(299)
    leave_on(engine, tier)
    assert engine.ask(prompt, mixed()).outcome(f"read_{tier}") == READABLE
    engine.clock.advance(3600)
    assert engine.ask(prompt, mixed()).read == 0


@TIERS
def test_a_longer_lifetime_takes_over_and_a_shorter_one_does_not(engine, prompt, tier):
    engine.ask(prompt, org_plan("acme", prompt, 300))
    engine.ask(prompt, org_plan("acme", prompt, 3600))
    engine.ask(prompt, org_plan("acme", prompt, 300))
    assert engine.resident() == {("device", 3600): 7, ("cpu", 3600): 7}
    leave_on(engine, tier)
    engine.clock.advance(3599)
    assert engine.ask(prompt, org_plan("acme", prompt, 300)).read == READABLE


def test_expired_memory_is_given_back_without_pressure(engine, prompt):
    engine.ask(prompt, org_plan("acme", prompt))
    kept = draw_tokens(random.Random(1), PROMPT)
    engine.ask(kept, org_plan("acme", kept, 3600))
    assert engine.resident() == {
        ("device", 300): 7, ("cpu", 300): 7, ("device", 3600): 7, ("cpu", 3600): 7
    }  # fmt: skip
    free = engine.free_chunks()
    cached = engine.scheduler.kv_cache_manager.block_pool.cached_block_hash_to_block
    assert len(cached) == 14

    engine.clock.advance(300)
    assert engine.connector.command_sweep() == 7
    assert engine.resident() == {("device", 3600): 7, ("cpu", 3600): 7}
    assert engine.free_chunks() == free + 7
    assert len(cached) == 7
    assert engine.connector.command_sweep() == 0


def test_what_no_breakpoint_covers_is_kept_on_the_device_only(engine, prompt):
    def partly():
        return plan(Caller("acme"), (512, Scope.ORG, 300), (PROMPT, Scope.ORG, 300, False))

    engine.ask(prompt, partly())
    assert engine.resident() == {("device", 300): 7, ("cpu", 300): 4}
    assert engine.ask(prompt, partly()).outcome("read_device") == READABLE
    engine.empty_device()
    answer = engine.ask(prompt, partly())
    assert (answer.read, answer.outcome("created")) == (512, 0)
    engine.clock.advance(300)
    assert engine.ask(prompt, partly()).read == 0


def fill(engine, chance, chunks, ttl_s):
    """Fill ``chunks`` chunks of the CPU tier; return the prompts that fill them."""
    prompts = []
    while chunks:
        blocks = min(chunks, 8)
        prompts.append(draw_tokens(chance, blocks * BLOCK + 5))
        engine.ask(prompts[-1], org_plan("acme", prompts[-1], ttl_s), max_tokens=1)
        chunks -= blocks
    engine.empty_device()
    return prompts


def still_in_memory(engine, prompts):
    """Return how many blocks of ``prompts`` the CPU tier still holds; refreshes them."""
    engine.empty_device()
    blocks = 0
    for tokens in prompts:
        # Read only: what is missing must not push out what is asked for next.
        readable = plan(Caller("acme"), (len(tokens), Scope.ORG, 300, False))
        blocks += engine.ask(tokens, readable, max_tokens=1).outcome("read_cpu") // BLOCK
    return blocks


def test_under_pressure_the_expired_goes_first(engine):
    chance = random.Random(2)
    long_lived = fill(engine, chance, 64, 3600)
    engine.clock.advance(1)
    fill(engine, chance, CPU_CHUNKS - 64, 300)
    engine.clock.advance(300)
    # The one that expires is the one used last.
    fill(engine, chance, CPU_CHUNKS - 64, 3600)
    assert still_in_memory(engine, long_lived) == 64


def test_under_pressure_a_longer_lifetime_is_a_claim_to_a_share(engine):
    """Nothing is known of what returns: beyond the share what is unused for longest goes first."""
    chance = random.Random(3)
    long_lived = fill(engine, chance, 64, 3600)
    engine.clock.advance(1)
    short_lived = fill(engine, chance, CPU_CHUNKS - 64, 300)
    engine.clock.advance(100)
    fill(engine, chance, 40, 300)
    kept = int(EvictionSettings().long_share * CPU_CHUNKS)
    assert 64 - 40 < kept < 64
    assert still_in_memory(engine, long_lived) == kept
    assert still_in_memory(engine, short_lived) == CPU_CHUNKS - 40 - kept


@TIERS
def test_a_block_expires_while_the_request_for_it_waits(engine, prompt, tier):
    chance = random.Random(4)
    expected = engine.ask(prompt, org_plan("acme", prompt)).tokens
    leave_on(engine, tier)
    ahead = [draw_tokens(chance, 200) for _ in range(MAX_REQUESTS)]
    for tokens in ahead:
        engine.add(Ask(tokens, None, max_tokens=20))
    waiting = engine.add(Ask(prompt, sealed(org_plan("acme", prompt))))
    for _ in range(3):
        assert engine.step()
    engine.clock.advance(300)
    while engine.step():
        pass
    answer = engine.answer(waiting)
    assert answer.read == 0
    assert answer.tokens == expected


@TIERS
def test_expiry_under_a_running_request_costs_it_nothing(engine, prompt, tier):
    expected = engine.ask(prompt, org_plan("acme", prompt)).tokens
    leave_on(engine, tier)
    running = engine.add(Ask(prompt, sealed(org_plan("acme", prompt))))
    while engine.step():
        engine.clock.advance(400)
    answer = engine.answer(running)
    assert answer.tokens == expected
    assert answer.read == READABLE
    engine.clock.advance(300)
    assert engine.ask(prompt, org_plan("acme", prompt)).read == 0
    engine.clock.advance(300)
    engine.connector.command_sweep()
    assert engine.resident() == {}


@pytest.mark.parametrize("steps", range(5))
def test_what_an_aborted_request_has_loaded_is_mortal(engine, prompt, steps):
    engine.ask(prompt, org_plan("acme", prompt))
    engine.empty_device()
    aborted = engine.add(Ask(prompt, sealed(org_plan("acme", prompt)), max_tokens=50))
    for _ in range(steps):
        engine.step()
    engine.abort(aborted)
    # Its transfers, if any are under way, end in the course of other work.
    engine.uncached(prompt)
    engine.clock.advance(300)
    engine.connector.command_sweep()
    assert engine.resident() == {}
    assert len(engine.scheduler.kv_cache_manager.block_pool.cached_block_hash_to_block) == 0
    assert engine.ask(prompt, org_plan("acme", prompt)).read == 0


def test_a_block_expires_between_two_lookups_of_one_step(engine, prompt, monkeypatch):
    """vLLM 0.33 holds the offloading manager's lock from the first look-up of a step on."""
    engine.ask(prompt, org_plan("acme", prompt))
    leave_on(engine, "cpu")
    look_up = engine.connector.get_num_new_matched_tokens

    def look_up_and_expire(request, num_computed_tokens):
        found = look_up(request, num_computed_tokens)
        engine.clock.advance(301)
        return found

    monkeypatch.setattr(engine.connector, "get_num_new_matched_tokens", look_up_and_expire)
    # So short that one step takes both.
    asks = [
        Ask(tokens, sealed(org_plan("zeta", tokens))) for tokens in (prompt[:90], prompt[90:180])
    ]
    with fails_after(60):
        answers = engine.run(*asks)
    assert [answer.read for answer in answers] == [0, 0]


@contextmanager
def fails_after(seconds):
    """Have what hangs for so long fail, on the main thread."""

    def fail(signum, frame):
        raise TimeoutError("the engine hangs")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
