"""A query of the ledger: what was used in a period, by what it is asked to be split by."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import ColumnElement, Connection, Table, func, select

from vllm_cachescope.usage.batch import HOUR_S
from vllm_cachescope.usage.names import kept_name
from vllm_cachescope.usage.period import format_time, month_of
from vllm_cachescope.usage.prices import Prices
from vllm_cachescope.usage.record import ttl_class
from vllm_cachescope.usage.store import day_column, week_column
from vllm_cachescope.usage.tables import EVICTIONS, TOKENS, USAGE
from vllm_cachescope.usage.totals import Totals

TIMES = ("hour", "day", "week", "month")
"""What a period can be split into; all of them begin in UTC, and weeks on Monday."""

DIMENSIONS = (*TIMES, "org", "session", "model", "replica", "scope", "ttl")
"""What usage can be split by."""

MAX_ROWS = 10_000
"""How many rows an answer has at most."""

_OF_TOKENS = ("scope", "ttl")
"""What tells tokens of one request apart: requests cannot be counted by it."""


class TooManyRowsError(ValueError):
    """Raised for a query whose answer has too many rows."""


@dataclass(frozen=True, slots=True)
class Query:
    """What is asked.

    Attributes:
        since: where the period begins, in seconds since the epoch; its whole hour counts.
        until: where the period ends; its whole hour counts, unless it is where an hour begins.
        by: what to split by, of `DIMENSIONS`.
        org: the one organisation that is asked for; None for all.
        session: the one session that is asked for; None for all.
        model: the one model that is asked for; None for all.
    """

    since: float
    until: float
    by: tuple[str, ...] = ()
    org: str | None = None
    session: str | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        if wrong := [name for name in self.by if name not in DIMENSIONS]:
            raise ValueError(f"by: {wrong[0]!r} is nothing to split by; allowed: {_listed()}")
        if len(set(self.by) & set(TIMES)) > 1 or len(set(self.by)) < len(self.by):
            raise ValueError(f"by: name one of {', '.join(TIMES)} at most, and nothing twice")

    def total(self) -> "Query":
        """Return the same query of everything in one row."""
        return replace(self, by=())

    @classmethod
    def read_by(cls, text: str) -> tuple[str, ...]:
        """Return what a list such as ``org,model`` names."""
        return tuple(name.strip() for name in text.split(",") if name.strip())


@dataclass(frozen=True, slots=True)
class UsageRow:
    """One row of an answer.

    Attributes:
        key: the value of each dimension that was asked for; times as ISO 8601, an empty session
            for requests that named none, or whose session is not kept any more.
        totals: what was used.
    """

    key: tuple[tuple[str, str], ...]
    totals: Totals

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain data for JSON."""
        return {**dict(self.key), **self.totals.to_dict()}


def ask(
    connection: Connection, query: Query, prices: Prices, max_rows: int = MAX_ROWS
) -> list[UsageRow]:
    """Return what was used, in the order of its keys.

    Args:
        connection: to the ledger's database.
        query: what is asked.
        prices: what tokens cost.
        max_rows: how many rows there may be.

    Raises:
        TooManyRowsError: if there are more.
    """
    found: dict[tuple[str, ...], Totals] = {}

    def totals_of(values: Sequence[Any]) -> Totals:
        key = tuple(map(_shown, query.by, values))
        if key not in found and len(found) >= max_rows:
            raise TooManyRowsError(
                f"there are more than {max_rows} rows; ask for a shorter period, or for less in by"
            )
        return found.setdefault(key, Totals())

    width = len(query.by)
    columns = [TOKENS.c.model, TOKENS.c.outcome, TOKENS.c.ttl_s]
    for row in _rows(connection, query, TOKENS, columns, [TOKENS.c.tokens]):
        model, outcome, ttl_s, tokens = row[width:]
        totals_of(row[:width]).add_tokens(outcome, int(ttl_s), int(tokens), model, prices)
    if not set(query.by) & set(_OF_TOKENS):
        c = USAGE.c
        counted = [c.requests, c.breaks, c.missed_tokens, c.output_tokens, c.prefill_seconds_saved]
        for row in _rows(connection, query, USAGE, [c.model], counted):
            model, *counts, saved = row[width:]
            requests, breaks, missed, output = map(int, counts)
            totals_of(row[:width]).add_requests(
                requests, breaks, missed, output, float(saved), model, prices
            )
        for row in _rows(connection, query, EVICTIONS, [EVICTIONS.c.part], [EVICTIONS.c.entries]):
            part, entries = row[width:]
            totals_of(row[:width]).add_evictions(part, int(entries))
    made = [
        UsageRow(tuple(zip(query.by, key, strict=True)), totals) for key, totals in found.items()
    ]
    return sorted(made, key=lambda row: row.key)


def _rows(
    connection: Connection,
    query: Query,
    table: Table,
    grouped: Sequence[ColumnElement[Any]],
    summed: Sequence[ColumnElement[Any]],
) -> Any:
    """Return rows of the dimensions, of ``grouped``, and of the sums of ``summed``."""
    c = table.c
    first = int(query.since) // HOUR_S * HOUR_S
    which = [c.hour >= first, c.hour < query.until]
    named = (("org", query.org), ("session", query.session), ("model", query.model))
    which += [c[name] == kept_name(value) for name, value in named if value is not None]
    keys = [*(_column(table, name) for name in query.by), *grouped]
    statement = select(*keys, *map(func.sum, summed)).where(*which).group_by(*keys)
    return connection.execution_options(stream_results=True, yield_per=1000).execute(statement)


def _column(table: Table, name: str) -> ColumnElement[Any]:
    hour: ColumnElement[int] = table.c.hour
    if name in ("day", "month"):
        return day_column(hour)
    if name == "week":
        return week_column(hour)
    column: ColumnElement[Any] = table.c["ttl_s" if name == "ttl" else name]
    return column


def _shown(name: str, value: Any) -> str:
    if name == "month":
        return format_time(month_of(int(value)))
    if name in TIMES:
        return format_time(int(value))
    if name == "ttl":
        return ttl_class(int(value)) if value else "none"
    return str(value)


def _listed() -> str:
    return ", ".join(DIMENSIONS)
