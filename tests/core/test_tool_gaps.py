"""How long tool calls take, as sessions and organisations show it, and which are nearly over."""

import random

import pytest

from vllm_cachescope.cache import tool_gaps
from vllm_cachescope.cache.tool_gaps import NEARLY_OVER, ToolGaps
from vllm_cachescope.tenancy.owner_tags import OwnerTags
from vllm_cachescope.tenancy.scope import Caller

TAGS = OwnerTags(b"a secret of the tests")
A, B, OTHER = (TAGS.of(Caller(*who)) for who in (("acme", "a"), ("acme", "b"), ("evil", "a")))


def learn(gaps: ToolGaps, owner: bytes, gap_s: float, now: float, times: int = 20) -> float:
    for number in range(times):
        gaps.call(owner, f"learnt {number}", now)
        now += gap_s
        gaps.answer(f"learnt {number}", now)
    return now


def test_a_call_is_nearly_over_by_what_its_session_is_used_to() -> None:
    gaps = ToolGaps()
    now = learn(gaps, A, 10.0, 0.0)
    assert gaps.usual_s(A) == pytest.approx(10.0)
    gaps.due(now)
    gaps.call(A, "pending", now)
    assert gaps.due(now + NEARLY_OVER * 10 - 0.1) == []
    assert gaps.due(now + NEARLY_OVER * 10 + 0.1) == ["pending"]
    assert gaps.due(now + 1000) == []
    # An answered one is not told.
    gaps.call(A, "answered", now)
    gaps.answer("answered", now + 1)
    assert gaps.due(now + 1000) == []


def test_a_new_session_is_taken_for_one_of_its_organisation_and_no_other() -> None:
    gaps = ToolGaps()
    learn(gaps, A, 4.0, 0.0)
    assert gaps.usual_s(B) == pytest.approx(4.0)
    assert gaps.usual_s(OTHER) is None
    gaps.call(OTHER, "unknown", 100.0)
    assert gaps.due(1e9) == []
    # It forgets what no longer holds.
    learn(gaps, A, 40.0, 1000.0)
    assert gaps.usual_s(A) == pytest.approx(40.0, rel=0.05)


def test_its_size_is_bounded(monkeypatch) -> None:
    monkeypatch.setattr(tool_gaps, "MAX_KEPT", 16)
    chance, gaps, now = random.Random(1), ToolGaps(), 0.0
    learn(gaps, A, 1.0, now)
    for number in range(2000):
        now += chance.random()
        gaps.call(A, str(number), now)
        if chance.random() < 0.5:
            gaps.answer(str(chance.randrange(number + 1)), now)
        if chance.random() < 0.1:
            gaps.due(now)
        assert len(gaps) <= 16
        assert len(gaps._due) <= 33  # noqa: SLF001
