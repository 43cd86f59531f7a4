"""The engine's metrics: each grows by what happened, and by nothing else."""

import random
from collections import Counter

import pytest

from tests.engine.engine import (
    BLOCK,
    BLOCK_BYTES,
    DEVICE_BLOCKS,
    OWNERS,
    Ask,
    Engine,
    draw_prompt,
    draw_tokens,
    org_plan,
    plan,
    sealed,
)
from tests.engine.samples import samples, since
from vllm_cachescope.metrics import (
    EARLY_EVICTIONS,
    EVICTION_IDLE,
    EVICTIONS,
    HIT_AGE,
    HIT_TOKENS,
    INPUT_COST,
    PREFILL_RATE,
    PREFILL_SECONDS_SAVED,
    PROMOTIONS,
    PROMPT_TOKENS,
    QUERY_TOKENS,
    REFUSED_PLANS,
    REQUESTS,
    TIER_BYTES,
    TIER_OPERATION_SECONDS,
)
from vllm_cachescope.tenancy.scope import Caller, Scope
from vllm_cachescope.usage.prices import Multipliers

pytestmark = pytest.mark.engine

TTL_S = 300


def test_prompts_add_up(engine: Engine) -> None:
    """Whatever is read, created or neither: the counters are the sums of the reports."""
    chance = random.Random(7)
    counted = (PROMPT_TOKENS, REQUESTS, QUERY_TOKENS, HIT_TOKENS, PREFILL_SECONDS_SAVED, INPUT_COST)
    before = {metric: samples(metric) for metric in counted}
    reports, earlier = [], []
    for step in range(40):
        tokens, cuts = draw_prompt(chance, earlier, 900)
        caller = Caller(chance.choice(["acme", "globex"]), chance.choice([None, "s"]))
        (answer,) = engine.run(Ask(tokens, sealed(plan(caller, *cuts)), 2))
        reports.append(answer.report)
        if step % 7 == 6:
            engine.empty_device()
    (short,) = engine.run(Ask(draw_tokens(chance, 20), sealed(org_plan("acme", range(20))), 2))
    reports.append(short.report)

    read: Counter[str] = Counter()
    saved_s: Counter[str] = Counter()
    requests: Counter[str] = Counter()
    cost = 0.0
    for report in reports:
        read.update(report.read_by_tier)
        for tier, tokens in report.read_by_tier.items():
            saved_s[tier] += report.prefill_seconds_saved * tokens / report.read_tokens
        created = report.created_by_ttl
        requests["read" if report.read_tokens else "created" if created else "neither"] += 1
        cost += Multipliers().equivalents(report.uncached_tokens, report.read_tokens, created)
    prompt_tokens = sum(report.prompt_tokens for report in reports)
    assert set(read) == {"device", "cpu"} and len(requests) == 3
    grown = {metric: since(before[metric], metric) for metric in counted}
    assert sum(grown[PROMPT_TOKENS].values()) == prompt_tokens
    assert grown[REQUESTS] == {(outcome,): n for outcome, n in requests.items()}
    assert grown[QUERY_TOKENS] == {(): prompt_tokens}
    assert grown[HIT_TOKENS] == {(tier,): tokens for tier, tokens in read.items()}
    assert grown[PREFILL_SECONDS_SAVED] == pytest.approx({(t,): s for t, s in saved_s.items()})
    assert grown[INPUT_COST] == pytest.approx({("without",): prompt_tokens, ("with",): cost})
    assert samples(PREFILL_RATE)[()] == engine.connector.cachescope.prefill_rate.tokens_per_s > 0


def test_a_hit_tells_how_old_it_is(engine: Engine) -> None:
    tokens = draw_tokens(random.Random(1), 5 * BLOCK + 3)
    engine.ask(tokens, org_plan("acme", tokens))
    before, total = samples(HIT_AGE, "_count"), samples(HIT_AGE, "_sum")
    buckets = samples(HIT_AGE, "_bucket")
    for tier, age in (("device", 0.3), ("device", 0.95), ("cpu", 0.2)):
        if tier == "cpu":
            engine.empty_device()
        engine.clock.advance(age * TTL_S)
        answer = engine.ask(tokens, org_plan("acme", tokens))
        assert answer.outcome(f"read_{tier}") == 5 * BLOCK
    assert since(before, HIT_AGE, "_count") == {("device", "5m"): 10, ("cpu", "5m"): 5}
    sums = {("device", "5m"): 5 * (0.3 + 0.95), ("cpu", "5m"): 5 * 0.2}
    assert since(total, HIT_AGE, "_sum") == pytest.approx(sums)
    found = since(buckets, HIT_AGE, "_bucket")
    device = {le: n for (tier, _, le), n in found.items() if tier == "device"}
    assert device == {"0.5": 5, "0.75": 5, "0.9": 5, "1.0": 10, "+Inf": 10}


def test_what_leaves_before_its_time(engine: Engine) -> None:
    chance = random.Random(2)
    kept = draw_tokens(chance, 20 * BLOCK + 1)
    engine.ask(kept, org_plan("acme", kept))
    lone = draw_tokens(chance, 10 * BLOCK + 1)
    # No breakpoint covers them: the device alone has these.
    engine.ask(lone, plan(Caller("acme"), (len(lone), Scope.ORG, TTL_S, False)))
    before = {m: samples(m) for m in (EARLY_EVICTIONS, EVICTIONS)}
    idle, shares = samples(EVICTION_IDLE, "_count"), samples(EVICTION_IDLE, "_sum")
    engine.clock.advance(0.5 * TTL_S)
    for _ in range(3):
        tokens = draw_tokens(chance, 30 * BLOCK)
        engine.ask(tokens, org_plan("acme", tokens), 1)
    (evicted,) = since(before[EVICTIONS], EVICTIONS).values()
    assert evicted >= 30 + 90 - DEVICE_BLOCKS
    assert since(before[EARLY_EVICTIONS], EARLY_EVICTIONS) == {
        ("device", "capacity", "5m", "true"): 10,
        ("device", "capacity", "5m", "false"): evicted - 10,
    }
    assert since(idle, EVICTION_IDLE, "_count") == {("device", "capacity", "5m"): evicted}
    # The first two had idled for half of their lives, the flood not at all.
    assert since(shares, EVICTION_IDLE, "_sum") == {("device", "capacity", "5m"): 30 * 0.5}

    before = {m: samples(m) for m in (EARLY_EVICTIONS, EVICTIONS)}
    purged = engine.connector.command_purge(OWNERS.prefix("acme"), "a purge of the tests")
    engine.ask(lone[:5], org_plan("globex", lone[:5]), 1)
    early = since(before[EARLY_EVICTIONS], EARLY_EVICTIONS)
    assert {key[:2] for key in early} == {("device", "purge"), ("cpu", "purge")}
    assert sum(early.values()) == sum(purged.values())


def test_what_expires_has_had_its_time(engine: Engine) -> None:
    tokens = draw_tokens(random.Random(3), 4 * BLOCK + 1)
    engine.ask(tokens, org_plan("acme", tokens))
    before, expired = samples(EARLY_EVICTIONS), samples(EVICTIONS)
    engine.clock.advance(TTL_S)
    assert engine.connector.command_sweep() > 0 and engine.connector.has_pending_push_work()
    engine.ask(tokens[:5], org_plan("acme", tokens[:5]), 1)
    assert since(before, EARLY_EVICTIONS) == {}
    assert since(expired, EVICTIONS) == {("device", "ttl"): 4, ("cpu", "ttl"): 4}


def test_copies_are_timed_and_weighed(engine: Engine) -> None:
    tokens = draw_tokens(random.Random(4), 6 * BLOCK + 1)
    before = {m: samples(m) for m in (PROMOTIONS, TIER_BYTES)}
    times = samples(TIER_OPERATION_SECONDS, "_count")
    engine.ask(tokens, org_plan("acme", tokens))
    engine.empty_device()
    engine.ask(tokens, org_plan("acme", tokens))
    assert since(before[PROMOTIONS], PROMOTIONS) == {("cpu", "device"): 6}
    moved = {("cpu", "load"): 6 * BLOCK_BYTES, ("cpu", "store"): 6 * BLOCK_BYTES}
    assert since(before[TIER_BYTES], TIER_BYTES) == moved
    taken = since(times, TIER_OPERATION_SECONDS, "_count")
    assert set(taken) == {("cpu", "load", "ok"), ("cpu", "store", "ok")}


def test_a_refused_plan_counts_once(engine: Engine) -> None:
    before = samples(REFUSED_PLANS)
    engine.uncached(draw_tokens(random.Random(5), 200))
    assert since(before, REFUSED_PLANS) == {(): 1}
