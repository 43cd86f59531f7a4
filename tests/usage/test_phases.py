import random

import pytest

from tests.usage.ledgers import KEEP, MONDAY, Books, record
from vllm_cachescope.cache.report import Row
from vllm_cachescope.tenancy.scope import Scope
from vllm_cachescope.usage.phases import Week, phases, weeks_by_model
from vllm_cachescope.usage.query import Query
from vllm_cachescope.usage.store import DAY_S, WEEK_S
from vllm_cachescope.usage.usage_ledger import phases_of


def weeks(*rates: float, tokens: int = 1_000_000) -> list[Week]:
    return [
        Week(MONDAY + i * WEEK_S, 1, 10, tokens, round(rate * tokens), 0)
        for i, rate in enumerate(rates)
    ]


def lengths(*rates: float) -> list[int]:
    return [len(phase.weeks) for phase in phases(weeks(*rates))]


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([], []),
        ([0.9], [1]),
        ([0.9] * 20, [20]),
        ([0.9] * 6 + [0.7] * 6, [6, 6]),
        ([0.1, 0.92, 0.93, 0.92, 0.93], [1, 4]),
        ([0.9] * 5 + [0.4] + [0.9] * 5, [5, 1, 5]),
        ([0.9, 0.91, 0.92, 0.93, 0.94], [5]),  # it drifts
        ([0.95] * 20 + [0.92] * 20, [20, 20]),  # little, for long
        ([0.95] * 2 + [0.92] * 2, [4]),
    ],
)
def test_where_the_trend_breaks(rates: list[float], expected: list[int]) -> None:
    assert lengths(*rates) == expected


def test_noise_is_no_phase() -> None:
    chance = random.Random(1)
    steady = [0.9 + chance.uniform(-0.02, 0.02) for _ in range(50)]
    assert lengths(*steady) == [50]
    assert lengths(*steady, *(rate - 0.1 for rate in steady)) == [50, 50]


def test_a_week_with_hardly_any_traffic_breaks_nothing() -> None:
    quiet = weeks(0.0, tokens=100)
    usual = weeks(*[0.9] * 8)
    assert len(phases([*usual[:4], *quiet, *usual[4:]])) == 1
    assert len(phases([*usual[:4], *weeks(0.0), *usual[4:]])) == 3


def test_weeks_without_use_are_left_out() -> None:
    (phase,) = phases([*weeks(0.9), *weeks(0.0, tokens=0), *weeks(0.9)])
    assert len(phase.weeks) == 2
    assert phase.hit_rate == pytest.approx(0.9)


def test_sessions_are_counted_once_a_week_also_when_their_names_are_gone(books: Books) -> None:
    records = []
    for week in range(12):
        for session in range(week + 1):
            for day, model in ((1, "toy"), (2, "toy"), (3, "large")):
                read = 900 if week < 6 else 500
                rows = (
                    Row("read_cpu", Scope.ORG, 300, read),
                    Row("created", Scope.ORG, 300, 60),
                    Row("uncached", Scope.ORG, 0, 940 - read),
                )
                at = MONDAY + week * WEEK_S + day * DAY_S
                records.append(record(at, session=f"s{session}", model=model, rows=rows))
        # Another organisation's session of the same name is another one.
        records.append(record(MONDAY + week * WEEK_S, "name:other", session="s0", rows=()))
    books.write(*records)
    end = MONDAY + 12 * WEEK_S
    query = Query(MONDAY, end)

    def answered(query: Query, each_model: bool) -> dict[str | None, list[int]]:
        with books.engine.connect() as connection:
            found = weeks_by_model(connection, query, each_model)
        return {model: [week.sessions for week in of] for model, of in found.items()}

    own = list(range(1, 13))
    expected = {None: [sessions + 1 for sessions in own]}
    by_model = {"toy": [s + 1 for s in own], "large": own}
    before = (answered(query, False), answered(query, True))
    books.store.maintain(end, 300)
    after = (answered(query, False), answered(query, True))
    assert before == after == (expected, by_model)
    of_acme = Query(MONDAY, end, (), "name:acme")
    assert answered(of_acme, False) == {None: own}
    assert answered(Query(MONDAY, end, (), None, None, "large"), False) == {None: own}
    with books.engine.connect() as connection:
        (told,) = phases_of(connection, of_acme)["models"]
    assert [len(phase["weeks"]) for phase in told["phases"]] == [6, 6]
    assert [phase["hit_rate"] for phase in told["phases"]] == [0.9, 0.5]
    assert [phase["fresh_share"] for phase in told["phases"]] == [0.04, 0.44]
    assert KEEP.sessions_for_s < 12 * WEEK_S
