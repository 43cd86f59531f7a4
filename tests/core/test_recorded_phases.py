import random
from dataclasses import replace

import pytest

from vllm_cachescope.cli.report.phases import PhaseCall, find_phases
from vllm_cachescope.cli.report.sessions import Session, SessionCall


def stretch(n: int, share: float, at: float = 0.0, **fields: int) -> list[PhaseCall]:
    """Return calls of about 1,000 tokens, ten seconds apart, that share so much, give or take."""
    rng = random.Random(n)
    return [
        PhaseCall(1000, round(1000 * min(1.0, share + rng.uniform(-0.02, 0.02))), at=at + 10.0 * i)
        if not fields
        else replace(PhaseCall(1000, round(1000 * share), at=at + 10.0 * i), **fields)
        for i in range(n)
    ]


def told(calls: list[PhaseCall]) -> list[tuple[int, int, str]]:
    return [(phase.first, phase.last, phase.began) for phase in find_phases(calls)]


def test_a_session_that_stays_as_it_is_has_one_phase() -> None:
    assert find_phases([]) == []
    assert told(stretch(1, 0.0)) == [(0, 0, "the session began")]
    assert told(stretch(200, 0.9)) == [(0, 199, "the session began")]
    # An agent that asks others now and then: the mix stays the same.
    mixed = [call for i in range(60) for call in stretch(1, 0.9, at=10.0 * i, agent=i % 4 == 3)]
    assert len(told(mixed)) == 1


def test_where_the_shared_share_changes() -> None:
    found = find_phases(
        [*stretch(30, 0.95), *stretch(20, 0.2, at=300.0), *stretch(30, 0.95, 500.0)]
    )
    assert [(one.first, one.last) for one in found] == [(0, 29), (30, 49), (50, 79)]
    assert [one.began for one in found[1:]] == ["less is shared", "more is shared"]
    assert sum(one.tokens for one in found) == 80_000
    assert found[1].share == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize(
    ("change", "began"),
    [
        ({"compacted": True}, "the context was compacted"),
        ({"model": 1}, "another model"),
        ({"at": 5000.0}, "after a pause of 78 minutes"),
        ({"agent": 1}, "another agent at work"),
    ],
)
def test_what_shows_that_a_phase_began(change: dict[str, float], began: str) -> None:
    rest = stretch(20, 0.75, at=float(change.get("at", 300.0)))
    if "model" in change or "agent" in change:
        rest = [replace(call, **change) for call in rest]
    else:
        rest[0] = replace(rest[0], **change)
    assert told([*stretch(30, 0.95), *rest]) == [(0, 29, "the session began"), (30, 49, began)]


def test_a_long_session_is_cut_between_bins() -> None:
    found = find_phases([*stretch(6000, 0.9), *stretch(4000, 0.5, at=60_000.0)])
    assert len(found) == 2 and abs(found[1].first - 6000) <= 20
    assert (found[0].first, found[1].last) == (0, 9999)


def test_a_session_packs_its_calls() -> None:
    calls = [
        SessionCall(
            i, 1.7e9 + i / 8, 900 + i, 800, 700, 5 * (i % 2), 1 + i % 3, i, 2, i == 4, i == 5
        )
        for i in range(9)
    ]
    session = Session(0, "s")
    for call in calls:
        session.add(call)
    assert list(session) == calls and len(session) == 9
    assert session.tokens == sum(call.tokens for call in calls)
    lineages = session.lineages()
    assert [(one.number, one.calls, one.breaks) for one in lineages] == [
        (1, 3, 0),
        (2, 3, 0),
        (3, 3, 1),
    ]
    assert sum(one.missed for one in lineages) == 20
