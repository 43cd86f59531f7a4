"""Plans whose ends are found by the prompt's own tokens."""

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_cachescope.prompt.boundaries import common_prefix
from vllm_cachescope.prompt.open_plan import (
    TAIL_TOKENS,
    Beginning,
    OpenPlan,
    OpenSpan,
    seal_open,
    unseal_open,
)
from vllm_cachescope.prompt.plan import Plan, Span, unseal
from vllm_cachescope.prompt.plan_maker import PlanMaker
from vllm_cachescope.prompt.segments import Segment
from vllm_cachescope.tenancy.scope import Caller, Scope

SECRET = b"a secret of the tests"
OWNER = bytes(range(16))
CHANCE = random.Random(1)
TOKENS = [CHANCE.randrange(50_000) for _ in range(900)]


def plan(*ends: int | None, tokens: list[int] = TOKENS) -> OpenPlan:
    return OpenPlan(
        tuple(
            OpenSpan(None if end is None else Beginning.of(tokens[:end]), Scope.ORG, f"k{i}", 300)
            for i, end in enumerate(ends)
        ),
        "nonce",
        OWNER,
    )


def ends(closed: Plan) -> list[int]:
    return [span.end for span in closed.spans]


@given(
    prompt=st.lists(st.integers(0, 3), min_size=1, max_size=3 * TAIL_TOKENS),
    rendered=st.lists(st.integers(0, 3), max_size=3 * TAIL_TOKENS),
    shared=st.integers(0, 3 * TAIL_TOKENS),
)
def test_an_end_is_never_behind_what_is_shared(prompt, rendered, shared):
    """It is where both part, or nowhere if they part before the tail: never too far."""
    rendered = prompt[:shared] + rendered
    end = Beginning.of(rendered).end_in(prompt)
    expected = common_prefix(rendered, prompt)
    assert end == (expected if expected >= len(rendered) - TAIL_TOKENS else 0)


def test_segments_end_where_their_beginnings_do():
    assert ends(plan(100, 500, None).closed(TOKENS)) == [100, 500, 900]
    assert ends(plan(None).closed(TOKENS)) == [900]
    other = [*TOKENS[:300], 7, *TOKENS[301:]]
    assert ends(plan(100, 500, None).closed(other)) == [100, 900]
    assert ends(plan(0, 100, 100, None).closed(TOKENS)) == [100, 900]
    assert ends(plan(500, None).closed(TOKENS[:200])) == [200]


def test_the_closing_of_a_shorter_rendering_is_no_part_of_it():
    rendered = [*TOKENS[:400], 1, 2, 3]
    opened = OpenPlan(
        (
            OpenSpan(Beginning.of(rendered), Scope.GLOBAL, "k", 60),
            OpenSpan(None, Scope.ORG, "l", 60),
        ),
        "",
        OWNER,
    )
    closed = opened.closed(TOKENS)
    assert closed.spans == (
        Span(400, Scope.GLOBAL, "k", 60),
        Span(900, Scope.ORG, "l", 60),
    )


def test_it_comes_as_it_was_sent():
    sent = plan(100, 3, None)
    assert unseal_open(json.loads(json.dumps(seal_open(sent, SECRET))), SECRET) == sent


@pytest.mark.parametrize("field", ["cut", "nonce", "owner", "mac"])
@pytest.mark.parametrize("value", [None, "", 5, [], [[None, 0, "k", 300, True]], "00" * 16])
def test_what_was_changed_is_not_ours(field: str, value: Any):
    sealed = seal_open(plan(100, None), SECRET)
    if sealed[field] != value:
        assert unseal_open({**sealed, field: value}, SECRET) is None


def test_neither_kind_of_plan_is_taken_for_the_other():
    sealed = seal_open(plan(100, None), SECRET)
    assert unseal(sealed, SECRET) is None
    assert unseal({**sealed, "spans": sealed["cut"]}, SECRET) is None
    assert unseal_open(seal_open(plan(None), b"another secret"), SECRET) is None


def test_the_maker_makes_both_alike():
    maker, caller = PlanMaker(SECRET), Caller("name:acme")
    cut = [
        Segment(None, Scope.GLOBAL, 3600, True),
        Segment(None, Scope.ORG, 300, True),
        Segment(None, Scope.SESSION, 300, True),
    ]
    for is_listed in (True, False):
        closed = maker.plan(cut, [100, 500, 900], caller, is_listed)
        beginnings = [Beginning.of(TOKENS[:100]), Beginning.of(TOKENS[:500]), None]
        opened = maker.open_plan(cut, beginnings, caller, is_listed).closed(TOKENS)
        assert opened.owner == closed.owner
        # The key of what nobody shares is each prompt's own.
        assert opened.spans[:2] == closed.spans[:2]
        assert [span.covered for span in opened.spans] == [True, True, False]
