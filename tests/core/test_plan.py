"""The plan: which span a block belongs to, and that nobody but the API can make one."""

import copy
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.plans import PLAN, plans
from vllm_cachescope.prompt.plan import Plan, seal, unseal
from vllm_cachescope.tenancy.scope import Scope

SECRET = b"a secret of sixteen bytes or more"


@pytest.mark.parametrize(
    ("block_end", "key"),
    [(16, "g"), (100, "g"), (101, "o"), (112, "o"), (300, "o"), (304, "s"), (350, "s")],
)
def test_a_block_belongs_to_the_narrowest_span_it_touches(block_end: int, key: str) -> None:
    assert PLAN.span_of(block_end).key == key


def test_generated_tokens_are_as_narrow_as_the_end_and_not_covered() -> None:
    span = PLAN.span_of(351)
    assert (span.key, span.scope, span.covered) == ("s", Scope.SESSION, False)


@pytest.mark.parametrize(
    ("block_end", "owner"),
    [(100, bytes(8) + b"acme    "), (300, b"acme    " + bytes(8)), (350, b"acme    s1      ")],
)
def test_a_blocks_owner_is_as_narrow_as_its_span(block_end: int, owner: bytes) -> None:
    assert replace(PLAN, owner=b"acme    s1      ").owner_of(block_end) == owner


@pytest.mark.parametrize(("block_end", "start"), [(100, 0), (112, 100), (350, 100), (400, 100)])
def test_what_everyone_shares_counts_towards_nobody_else(block_end: int, start: int) -> None:
    assert PLAN.quota_start(block_end) == start
    # Where everyone shares the whole prompt, its answer is everyone's as well.
    assert replace(PLAN, spans=PLAN.spans[:1]).quota_start(block_end) == 0


@given(plans(), plans())
def test_nobody_can_put_another_owner_on_a_plan(plan: Plan, other: Plan) -> None:
    forged = seal(plan, SECRET) | {"owner": other.owner.hex()}
    assert (unseal(forged, SECRET) is None) == (plan.owner != other.owner)


def test_covered_tokens_end_at_the_last_covered_span() -> None:
    assert PLAN.covered_tokens == 300


@given(plans(), st.integers(1, 128))
def test_ranges_are_the_blocks_spans(plan: Plan, block_size: int) -> None:
    ranges = list(plan.ranges(block_size))
    position = 0
    for start, end, span in ranges:
        assert start == position < end
        for block_end in range((start // block_size + 1) * block_size, end + 1, block_size):
            assert plan.span_of(block_end) == span
        position = end
    assert position == plan.spans[-1].end


@given(plans())
def test_a_sealed_plan_comes_back_from_json(plan: Plan) -> None:
    assert unseal(json.loads(json.dumps(seal(plan, SECRET))), SECRET) == plan


@given(plans(), st.data())
def test_no_change_to_a_sealed_plan_is_accepted(plan: Plan, data: st.DataObject) -> None:
    forged = copy.deepcopy(seal(plan, SECRET))
    span = data.draw(st.integers(0, len(plan.spans) - 1))
    field = data.draw(st.integers(0, 4))
    value = forged["spans"][span][field]
    forged["spans"][span][field] = f"{value}x" if isinstance(value, str) else value + 1
    assert unseal(forged, SECRET) is None


@pytest.mark.parametrize(
    "data",
    [
        None,
        7,
        {},
        {"spans": [], "nonce": "n"},
        {"spans": "x", "nonce": "n", "mac": "m"},
        {"spans": [[float("nan")]], "nonce": "n", "owner": "", "mac": "\udc80"},
        {"spans": [[object()]], "nonce": "n", "owner": "", "mac": "m"},
        {"spans": [], "nonce": "n", "owner": 7, "mac": "m"},
    ],
)
def test_what_is_no_plan_is_refused(data: object) -> None:
    assert unseal(data, SECRET) is None


def test_another_secret_is_refused() -> None:
    assert unseal(seal(PLAN, b"another secret, as long"), SECRET) is None
