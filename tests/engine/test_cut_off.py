"""What a prompt leaves that is cut off, and what the report says of it."""

import random

import pytest

from tests.engine.engine import BLOCK, MAX_TOKENS_PER_STEP, Ask, draw_tokens, org_plan, plan, sealed
from vllm_cachescope.cache.report import Report
from vllm_cachescope.tenancy.scope import Caller, Scope

pytestmark = pytest.mark.engine

PROMPT = 1000


def test_what_was_computed_until_then_is_what_the_next_one_reads(engine) -> None:
    prompt = draw_tokens(random.Random("cut off"), PROMPT)
    given_up = org_plan("acme", prompt)
    request = engine.add(Ask(prompt, sealed(given_up)))
    engine.step()
    engine.step()
    engine.abort(request)
    report = Report.from_wire(engine.connector.command_report(given_up.nonce))
    left = 2 * MAX_TOKENS_PER_STEP
    assert report.computed_tokens == report.tokens("created") == left
    again = engine.ask(prompt, org_plan("acme", prompt))
    assert again.read == left
    assert again.report.computed_tokens == PROMPT
    assert again.report.blocks == report.blocks
    assert report.blocks.tokens == PROMPT // BLOCK * BLOCK


def test_blocks_tell_scopes_apart(engine) -> None:
    prompt = draw_tokens(random.Random("two scopes"), PROMPT)
    caller = Caller("acme", "s")
    whole = engine.ask(prompt, plan(caller, (PROMPT, Scope.ORG, 300))).report
    # The block in which the session's part begins is the session's.
    end = 3 * BLOCK - 2
    narrow = engine.ask(prompt, plan(caller, (end, Scope.ORG, 300), (PROMPT, Scope.SESSION, 300)))
    assert narrow.read == whole.blocks.shared_tokens(narrow.report.blocks) == 2 * BLOCK
