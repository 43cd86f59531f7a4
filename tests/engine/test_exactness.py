"""Whatever tier a prompt's beginning comes from, what is generated is what nothing cached gives."""

import random

import numpy as np
import pytest

from tests.engine.engine import (
    BLOCK,
    DEVICE_BLOCKS,
    MAX_REQUESTS,
    MAX_TOKENS_PER_STEP,
    Ask,
    draw_prompt,
    draw_tokens,
    org_plan,
    plan,
    sealed,
)
from vllm_cachescope.tenancy.scope import Caller, Scope

pytestmark = pytest.mark.engine

CALLERS = [Caller("acme", "s1"), Caller("acme", "s2"), Caller("zeta")]


@pytest.mark.parametrize("seed", range(6))
def test_random_prompts_and_plans(engine, seed):
    chance = random.Random(seed)
    earlier, expected = [], {}
    read = {"read_device": 0, "read_cpu": 0}
    chunked = 0
    for _ in range(20):
        batch = [draw_prompt(chance, earlier, 900) for _ in range(chance.choice([1, 2, 4, 8]))]
        for tokens, _ in batch:
            if tuple(tokens) not in expected:
                expected[tuple(tokens)] = engine.uncached(tokens)
        if chance.random() < 0.4:
            engine.empty_device()
        engine.clock.advance(chance.choice([0, 0, 0, 0, 10, 200]))
        answers = engine.run(
            *[Ask(tokens, sealed(plan(chance.choice(CALLERS), *cuts))) for tokens, cuts in batch]
        )
        for (tokens, _), answer in zip(batch, answers, strict=True):
            assert answer.tokens == expected[tuple(tokens)]
            for outcome in read:
                read[outcome] += answer.outcome(outcome)
            chunked += len(tokens) - answer.read > MAX_TOKENS_PER_STEP
    assert min(read.values()) > 5 * BLOCK, "nothing to compare with: the caches were not used"
    assert chunked > 5


@pytest.mark.parametrize("tier", ["device", "cpu"])
def test_preempted_requests(engine, tier):
    chance = random.Random(5)
    begin = draw_tokens(chance, 2 * BLOCK)
    # Together they fit while they are short: each grows into one block more.
    size = DEVICE_BLOCKS // MAX_REQUESTS * BLOCK
    prompts = [begin + draw_tokens(chance, size - len(begin) - 10) for _ in range(MAX_REQUESTS)]
    prompts.append(draw_tokens(chance, size - 10))
    expected = [engine.uncached(tokens, max_tokens=160) for tokens in prompts]

    for tokens in prompts[:2]:
        engine.ask(tokens, org_plan("acme", tokens), max_tokens=1)
    if tier == "cpu":
        engine.empty_device()
    before = engine.counter("vllm:num_preemptions")
    # Each in an org of its own, but for the first two: a shared beginning would make room.
    orgs = ["acme", "acme", *(f"org {i}" for i in range(len(prompts)))]
    answers = engine.run(
        *[
            Ask(tokens, sealed(org_plan(org, tokens)), max_tokens=160)
            for tokens, org in zip(prompts, orgs, strict=False)
        ]
    )
    assert engine.counter("vllm:num_preemptions") > before
    assert [answer.tokens for answer in answers] == expected
    assert answers[0].outcome(f"read_{tier}") > 0

    # What was lost and computed again is as mortal as all else.
    engine.clock.advance(300)
    engine.connector.command_sweep()
    assert engine.resident() == {}
    pool = engine.scheduler.kv_cache_manager.block_pool
    assert len(pool.cached_block_hash_to_block) == 0


def test_many_at_once_on_one_prefix(engine):
    chance = random.Random(6)
    begin = draw_tokens(chance, 5 * BLOCK + 50)
    prompts = [begin + draw_tokens(chance, chance.randrange(1, 200)) for _ in range(12)]
    expected = [engine.uncached(tokens) for tokens in prompts]
    callers = [chance.choice(CALLERS) for _ in prompts]

    def asks():
        return [
            Ask(
                tokens,
                sealed(plan(caller, (600, Scope.GLOBAL, 3600), (len(tokens), Scope.ORG, 300))),
            )
            for tokens, caller in zip(prompts, callers, strict=True)
        ]

    for _ in range(2):
        assert [answer.tokens for answer in engine.run(*asks())] == expected
        engine.empty_device()
    answers = engine.run(*asks())
    assert [answer.tokens for answer in answers] == expected
    assert all(answer.read >= 4 * BLOCK for answer in answers)


def test_emptying_the_device_cache_keeps_the_cpu_tier(engine):
    tokens = draw_tokens(random.Random(7), 700)
    engine.ask(tokens, org_plan("acme", tokens))
    engine.empty_device()
    assert engine.resident() == {("cpu", 300): 5}
    engine.empty()
    assert engine.resident() == {}


def test_these_tests_would_see_wrong_memory(engine):
    """A change in what the CPU tier holds changes what is generated."""
    tokens = draw_tokens(random.Random(8), 700)
    first = engine.ask(tokens, org_plan("acme", tokens), max_tokens=24).tokens
    engine.empty_device()
    primary = engine.connector.connector_scheduler.manager.primary_tier
    memory = np.asarray(primary.get_kv_memoryview())
    memory[...] = np.roll(memory, 4 * 32, axis=1)
    answer = engine.ask(tokens, org_plan("acme", tokens), max_tokens=24)
    assert answer.outcome("read_cpu") == 640
    assert answer.tokens != first
