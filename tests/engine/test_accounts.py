"""Each prompt's report, also where requests that run together share blocks."""

import random

import pytest

from tests.engine.engine import BLOCK, Ask, draw_tokens, org_plan, plan, sealed
from vllm_cachescope.tenancy.scope import Caller, Scope

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("size", [200, 250, 700, 1000])
def test_what_requests_create_together_is_counted_once(engine, size):
    """The second reads blocks that the first fills in the same step."""
    chance = random.Random(size)
    tokens = draw_tokens(chance, size)
    answers = engine.run(*[Ask(tokens, sealed(org_plan("acme", tokens))) for _ in range(5)])
    created = sum(answer.outcome("created") for answer in answers)
    assert created == size // BLOCK * BLOCK
    assert answers[0].outcome("created") == created
    for answer in answers:
        assert answer.read == answer.outcome("read_device") + answer.outcome("read_cpu")
        assert answer.report.prompt_tokens == size


def test_a_longer_lifetime_counts_for_what_is_read_as_it_is_created(engine):
    tokens = draw_tokens(random.Random(1), 250)
    short, long = (plan(Caller("acme"), (250, Scope.ORG, ttl_s)) for ttl_s in (300, 3600))
    first, second = engine.run(Ask(tokens, sealed(short)), Ask(tokens, sealed(long)))
    assert (first.read, second.read) == (0, BLOCK)
    engine.clock.advance(300)
    assert engine.ask(tokens, org_plan("acme", tokens)).read == BLOCK
