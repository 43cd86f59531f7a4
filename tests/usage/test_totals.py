import csv
import io
from pathlib import Path

import pytest
from pyarrow import parquet

from tests.usage.ledgers import MONDAY, Books, record
from vllm_cachescope.cache.report import Row
from vllm_cachescope.tenancy.scope import Scope
from vllm_cachescope.usage.export import flat_rows, to_csv, to_parquet
from vllm_cachescope.usage.period import parse_time
from vllm_cachescope.usage.prices import ModelPrice, Prices
from vllm_cachescope.usage.query import Query
from vllm_cachescope.usage.store import DAY_S
from vllm_cachescope.usage.totals import Totals
from vllm_cachescope.usage.usage_ledger import usage_of

TOY = Prices({"toy": ModelPrice(3.0, 15.0)})


def used(**tokens: int) -> Totals:
    totals = Totals()
    for outcome, count in tokens.items():
        totals.add_tokens(outcome, 300, count, "toy", TOY)
    return totals


def answer(books: Books, *by: str, prices: Prices = TOY) -> dict:
    with books.engine.connect() as connection:
        return usage_of(connection, Query(MONDAY, MONDAY + 90 * DAY_S, by), prices)


def test_known_figures() -> None:
    totals = used(read_cpu=1_840_000, created=160_000)
    assert totals.cost_without == pytest.approx(6.0)
    assert totals.cost_with == pytest.approx(1.152)
    assert totals.to_dict()["saved_share"] == pytest.approx(0.808)
    assert totals.hit_rate == 0.92
    written = used(read_cpu=12_198_713_224, created=9_965_286)
    assert round(written.reads_per_write or 0) == 1224
    fresh = used(read_cpu=12_198_713_224, uncached=9_965_286)
    assert round(fresh.reads_per_fresh or 0) == 1224


def test_ratios_of_nothing_are_unknown() -> None:
    none = Totals()
    assert none.hit_rate is none.fresh_share is none.reads_per_write is None


def test_one_unknown_price_makes_the_sum_unknown_and_not_smaller(books: Books) -> None:
    books.write(record(), record(model="large"))
    by_model = {row["model"]: row for row in answer(books, "model")["rows"]}
    assert by_model["large"]["cost_with"] is by_model["large"]["saved_share"] is None
    assert by_model["toy"]["cost_of_output"] == pytest.approx(15e-6 * 7)
    total = answer(books)["total"]
    assert total["cost_without"] is total["cost_with"] is total["cost_of_output"] is None
    assert answer(books, prices=Prices())["currency"] is None


def test_lifetimes_are_priced_one_by_one(books: Books) -> None:
    lifetimes = (60, 300, 1800, 3600)
    books.write(record(rows=tuple(Row("created", Scope.ORG, ttl, 1_000_000) for ttl in lifetimes)))
    total = answer(books)["total"]
    assert total["cost_with"] == pytest.approx(3 * (1.25 + 1.25 + 2 + 2))
    assert total["created"] == {"5m": 1_000_000, "1h": 1_000_000, "other": 2_000_000}


def test_split_by_time(books: Books) -> None:
    for day in (0, 1, 29, 60):
        books.write(record(MONDAY + day * DAY_S + 3700))
    assert answer(books, "hour")["rows"][0]["hour"] == "2026-11-02T01:00:00Z"
    assert [row["day"][:10] for row in answer(books, "day")["rows"]] == [
        *("2026-11-02", "2026-11-03", "2026-12-01", "2027-01-01")
    ]
    assert [row["week"][:10] for row in answer(books, "week")["rows"]] == [
        *("2026-11-02", "2026-11-30", "2026-12-28")
    ]
    months = answer(books, "month")["rows"]
    assert [(row["month"][:10], row["requests"]) for row in months] == [
        *(("2026-11-01", 2), ("2026-12-01", 1), ("2027-01-01", 1))
    ]


def test_by_scope_and_lifetime_requests_cannot_be_counted(books: Books) -> None:
    books.write(record())
    rows = answer(books, "scope", "ttl")["rows"]
    assert [(row["scope"], row["ttl"], row["prompt_tokens"]) for row in rows] == [
        *(("org", "5m", 120), ("session", "none", 5))
    ]
    assert all(row["requests"] is row["cost_of_output"] is None for row in rows)


@pytest.mark.parametrize("by", [("orgs",), ("day", "week"), ("org", "org")])
def test_what_cannot_be_split_by(by: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="by: "):
        Query(0, 1, by)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7d", MONDAY - 7 * DAY_S),
        ("now", MONDAY),
        ("2026-11-01", MONDAY - DAY_S),
        ("2026-11-01T12:00+02:00", MONDAY - DAY_S + 10 * 3600),
        ("2026-11-01T12:00Z", MONDAY - DAY_S + 12 * 3600),
        ("1793577600", MONDAY),
    ],
)
def test_times(text: str, expected: float) -> None:
    assert parse_time(text, MONDAY) == expected


@pytest.mark.parametrize("text", ["", "7 days", "nan", "inf", "-5", "1e30", "2026-13-01", "٣"])
def test_what_is_no_time(text: str) -> None:
    if text == "٣":  # a digit, of which Python makes 3 seconds after the epoch
        assert parse_time(text, MONDAY) == 3
        return
    with pytest.raises(ValueError, match="is no time"):
        parse_time(text, MONDAY)


def test_csv_and_parquet_have_every_column_and_no_formula(books: Books, tmp_path: Path) -> None:
    evil = '=HYPERLINK("http://x")'
    books.write(record(session=evil), record(session="b", model="large"))
    found = answer(books, "session", "model")
    rows = list(csv.DictReader(io.StringIO(to_csv(found))))
    assert [row["session"] for row in rows] == [f"'{evil}", "b"]
    assert [row["cost_with"] for row in rows] == [rows[0]["cost_with"], ""]
    assert [row["read_cpu"] for row in rows] == ["100", "100"]
    to_parquet(found, tmp_path / "usage.parquet")
    table = parquet.read_table(tmp_path / "usage.parquet")
    assert table.to_pylist() == flat_rows(found)
    assert str(table.schema.field("cost_with").type) == "double"
    assert str(table.schema.field("created_5m").type) == "int64"
    nothing = answer(books, "session", prices=Prices()) | {"rows": []}
    to_parquet(nothing, tmp_path / "empty.parquet")
    assert to_csv(nothing) == ""
