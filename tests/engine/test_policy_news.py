"""What the CPU tier's policy of a running engine is told after requests are over."""

import random

import pytest

from tests.engine.engine import BLOCK, OWNERS, draw_tokens, org_plan, plan
from vllm_cachescope.cache.runs import Ended
from vllm_cachescope.tenancy.scope import Caller, Scope

pytestmark = pytest.mark.engine


def test_how_an_answer_ended_is_known_to_the_order_once_it_is_told(engine) -> None:
    prompt = draw_tokens(random.Random(1), 4 * BLOCK + 7)
    order = engine.connector.cachescope.local._cpu._policy._order  # noqa: SLF001
    told = org_plan("acme", prompt)
    engine.ask(prompt, told)
    engine.connector.command_endings([(told.nonce, 1), ("unknown", 0)])
    # vLLM tells the policy of a request that is over with the next step.
    engine.ask(draw_tokens(random.Random(4), 2 * BLOCK), org_plan("acme", prompt[: 2 * BLOCK]))
    kinds = {order._counts.kind(run.cell) for run in order.runs.values()}  # noqa: SLF001
    assert any(len(kind) == 5 and kind[-1] == Ended.TOOLS for kind in kinds), kinds


def test_a_session_that_is_over_goes_first_and_can_be_read_until_then(engine) -> None:
    over, other = (draw_tokens(random.Random(n), 4 * BLOCK + 7) for n in (2, 3))
    for caller, prompt in ((Caller("acme", "over"), over), (Caller("acme", "other"), other)):
        engine.ask(prompt, plan(caller, (len(prompt), Scope.SESSION, 300)))
    owner = OWNERS.prefix("acme", "over")
    assert engine.connector.command_end_session(owner) == 2 * 4  # on the device and in memory
    assert engine.connector.command_end_session(OWNERS.prefix("acme", "nobody")) == 0
    order = engine.connector.cachescope.local._cpu._policy._order  # noqa: SLF001
    first = order.victims(4, engine.connector.cachescope.now(), lambda key: False)
    owned = engine.connector.cachescope.ledger.owned(owner)
    assert set(first) == set(owned)
    engine.empty_device()
    again = engine.ask(over, plan(Caller("acme", "over"), (len(over), Scope.SESSION, 300)))
    assert again.read >= 3 * BLOCK
