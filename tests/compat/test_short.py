"""The product's promises in one short run, for every vLLM it is to run on."""

import random

from tests.engine.engine import BLOCK, Ask, Engine, draw_tokens, org_plan, plan, sealed
from vllm_cachescope.tenancy.scope import Caller, Scope


def test_scopes_tiers_and_lifetimes(engine: Engine) -> None:
    chance = random.Random(7)
    prompt = draw_tokens(chance, 8 * BLOCK + 40)
    expected = engine.uncached(prompt)

    def cuts(org: str):
        ends = ((4 * BLOCK + 10, Scope.GLOBAL, 3600), (len(prompt), Scope.ORG, 300))
        return plan(Caller(org), *ends)

    first = engine.ask(prompt, cuts("acme"))
    assert (first.tokens, first.read, first.outcome("created")) == (expected, 0, 8 * BLOCK)

    again = engine.ask(prompt, cuts("acme"))
    assert (again.tokens, again.outcome("read_device")) == (expected, 8 * BLOCK)

    other = engine.ask(prompt, cuts("other"))
    assert (other.tokens, other.read) == (expected, 4 * BLOCK), "the global span and no more"

    engine.empty_device()
    from_memory = engine.ask(prompt, cuts("acme"))
    assert (from_memory.tokens, from_memory.outcome("read_cpu")) == (expected, 8 * BLOCK)

    engine.clock.advance(301)
    later = engine.ask(prompt, cuts("acme"))
    assert (later.tokens, later.read) == (expected, 4 * BLOCK), "the hour outlives the minutes"
    assert later.report is not None
    (miss,) = later.report.misses
    assert (miss.cause, miss.tier, miss.tokens) == ("expired", "cpu", 4 * BLOCK)

    engine.clock.advance(3601)
    assert engine.connector.command_sweep() > 0
    assert engine.resident() == {}
    assert engine.ask(prompt, cuts("acme")).read == 0


def test_a_plan_of_ones_own_making_shares_nothing(engine: Engine) -> None:
    prompt = draw_tokens(random.Random(8), 3 * BLOCK + 5)
    engine.ask(prompt, org_plan("acme", prompt))
    forged = sealed(org_plan("acme", prompt))
    forged["cachescope"]["nonce"] += "x"
    (answer,) = engine.run(Ask(prompt, forged))
    assert answer.read == 0
