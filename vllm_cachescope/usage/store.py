"""The store of the ledger: writes batches, and forgets what is asked for or has become old."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

from sqlalchemy import (
    BindParameter,
    ColumnElement,
    Connection,
    Dialect,
    Engine,
    Table,
    and_,
    delete,
    func,
    insert,
    literal,
    select,
    true,
    update,
)
from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

from vllm_cachescope.usage.batch import HOUR_S, Batch
from vllm_cachescope.usage.names import kept_name
from vllm_cachescope.usage.tables import (
    EVICTIONS,
    JOBS,
    METADATA,
    REQUESTS,
    SESSIONS,
    TOKENS,
    USAGE,
)

DAY_S = 86400
WEEK_S = 7 * DAY_S
_MONDAY_S = 4 * DAY_S
"""The first Monday after the epoch."""

_MAINTENANCE = "maintenance"

_SUMMED = {
    TOKENS: ("tokens",),
    USAGE: ("requests", "breaks", "missed_tokens", "output_tokens", "prefill_seconds_saved"),
    EVICTIONS: ("entries",),
}
"""The columns of the tables of sums that are summed up; the others are the key."""


@dataclass(frozen=True, slots=True)
class Retention:
    """How much is kept, and how long; see `LedgerSettings`. Times are seconds."""

    max_requests: int
    requests_for_s: int
    sessions_for_s: int
    max_session_rows: int
    hours_for_s: int
    days_for_s: int


class Store:
    """The ledger in one database, which any number of processes may write at once.

    Args:
        engine: the database.
        retention: how much is kept.
    """

    def __init__(self, engine: Engine, retention: Retention) -> None:
        self._engine = engine
        self._retention = retention

    def create(self) -> None:
        """Make the tables that are not there."""
        for _ in METADATA.tables:
            # Another process may make each of them in between.
            with suppress(OperationalError, ProgrammingError, IntegrityError):
                METADATA.create_all(self._engine)
                break
        else:
            METADATA.create_all(self._engine)
        try:
            with self._engine.begin() as connection:
                connection.execute(insert(JOBS).values(name=_MAINTENANCE, at=0.0))
        except IntegrityError:
            pass  # It is there.

    def write(self, batch: Batch) -> None:
        """Add a batch, as a whole or not at all."""
        with self._engine.begin() as connection:
            for table, rows in (
                (REQUESTS, batch.requests if self._retention.max_requests else []),
                (TOKENS, batch.token_rows),
                (USAGE, batch.usage_rows),
            ):
                if rows:
                    _insert(connection, table, rows)

    def write_evictions(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows of `tables.EVICTIONS`, all of them or none."""
        with self._engine.begin() as connection:
            connection.execute(insert(EVICTIONS), list(rows))

    def purge(self, org: str | None, session: str | None = None) -> None:
        """Forget the requests of ``org``, or of one session of ``org``; with None, of everyone.

        Sums stay, since they are what is billed, but name none of these sessions any more.
        """
        whose = true() if org is None else REQUESTS.c.org == kept_name(org)
        if session is not None:
            whose = and_(whose, REQUESTS.c.session == kept_name(session))
        with self._engine.begin() as connection:
            connection.execute(delete(REQUESTS).where(whose))
        org_name = None if org is None else kept_name(org)
        self._drop_sessions(org_name, None if session is None else kept_name(session), None)

    def maintain(self, now: float, every_s: float) -> bool:
        """Sum up rows of one key, and drop what has become old, unless somebody did so within the
        last ``every_s`` seconds before ``now``. Return whether it was done."""
        due = and_(JOBS.c.name == _MAINTENANCE, JOBS.c.at <= now - every_s)
        with self._engine.begin() as connection:
            claimed = connection.execute(update(JOBS).where(due).values(at=now))
        if not claimed.rowcount:
            return False
        kept = self._retention
        self._bound_requests(now)
        self._drop_sessions(None, None, week_of(int(now) - kept.sessions_for_s))
        self._bound_session_rows(now)
        self._sum_up_days(int(now) - kept.hours_for_s)
        self._drop_days(int(now) - kept.days_for_s)
        hour = int(now) // HOUR_S * HOUR_S
        for one in (hour - HOUR_S, hour):
            for table in _SUMMED:
                self._sum_up(table, table.c.hour == one, {})
        return True

    @contextmanager
    def _serializable(self) -> Iterator[Connection]:
        # What is summed up must be exactly what is deleted, whoever writes meanwhile.
        engine = self._engine.execution_options(isolation_level="SERIALIZABLE")
        with engine.begin() as connection:
            yield connection

    def _sum_up(
        self, table: Table, which: ColumnElement[bool], replaced: Mapping[str, ColumnElement[Any]]
    ) -> None:
        """Put one row in the place of all of one key.

        Args:
            table: one of the tables of sums.
            which: which of its rows.
            replaced: what stands in the key in the place of some columns, by name.
        """
        with self._serializable() as connection:
            _sum_up(connection, table, which, replaced)

    def _drop_sessions(self, org: str | None, session: str | None, before: int | None) -> None:
        """Have sums name sessions no more, and keep how many each week had.

        Args:
            org: whose; None for everyone's.
            session: the one session; None for all.
            before: where the hours end whose sums are meant; None for all.
        """
        with self._serializable() as connection:
            for table in (USAGE, TOKENS):
                which: list[ColumnElement[bool]] = [table.c.session != ""]
                which += [] if org is None else [table.c.org == org]
                which += [] if session is None else [table.c.session == session]
                which += [] if before is None else [table.c.hour < before]
                if table is USAGE:
                    _count_sessions(connection, and_(*which))
                _sum_up(connection, table, and_(*which), {"session": literal("")})

    def _bound_session_rows(self, now: float) -> None:
        """Drop sessions of the oldest days until few enough rows name one."""
        named = TOKENS.c.session != ""
        today = int(now) // DAY_S * DAY_S
        while True:
            with self._engine.connect() as connection:
                rows, oldest = connection.execute(
                    select(func.count(), func.min(TOKENS.c.hour)).where(named)
                ).one()
            if rows <= self._retention.max_session_rows or oldest >= today:
                return
            self._drop_sessions(None, None, int(oldest) // DAY_S * DAY_S + DAY_S)

    def _sum_up_days(self, before: int) -> None:
        before = before // DAY_S * DAY_S
        for table in _SUMMED:
            hour = table.c.hour
            which = and_(hour < before, hour % DAY_S != 0)
            self._sum_up(table, which, {"hour": day_column(hour)})

    def _drop_days(self, before: int) -> None:
        with self._engine.begin() as connection:
            for table in _SUMMED:
                connection.execute(delete(table).where(table.c.hour < before))
            connection.execute(delete(SESSIONS).where(SESSIONS.c.week < before - WEEK_S))

    def _bound_requests(self, now: float) -> None:
        """Drop the oldest requests, of those accounts that have most."""
        limit = self._retention.max_requests
        with self._engine.begin() as connection:
            old = REQUESTS.c.at < now - self._retention.requests_for_s
            connection.execute(delete(REQUESTS).where(old))
            account = REQUESTS.c.account
            counts = Counter(
                {
                    name: int(count)
                    for name, count in connection.execute(
                        select(account, func.count()).group_by(account)
                    )
                }
            )
            each = _equal_share(counts, limit)
            for name in [name for name, count in counts.items() if count > each]:
                own = REQUESTS.c.account == name
                newest = select(REQUESTS.c.id).where(own).order_by(REQUESTS.c.id.desc())
                last = connection.execute(newest.offset(each).limit(1)).scalar()
                if last is not None:
                    connection.execute(delete(REQUESTS).where(own, REQUESTS.c.id <= last))


def week_of(at: int) -> int:
    """Return the beginning of the week of ``at``: Monday, 0:00 UTC; both in seconds since the
    epoch."""
    return at - (at - _MONDAY_S) % WEEK_S


def week_column(hour: ColumnElement[int]) -> ColumnElement[int]:
    """Return what `week_of` does, for a column."""
    # Not the difference to Monday: some databases keep the sign of what they divide. And no
    # parameters: those of equal expressions would differ, and nothing could be grouped by them.
    days, week = (literal(n, literal_execute=True) for n in (WEEK_S - _MONDAY_S, WEEK_S))
    return hour - (hour + days) % week


def day_column(hour: ColumnElement[int]) -> ColumnElement[int]:
    """Return the beginning of the day, in UTC, of a column in seconds since the epoch."""
    return hour - hour % literal(DAY_S, literal_execute=True)


def _insert(connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert rows, all with the same columns, as what the driver takes: SQLAlchemy's own way with
    parameters costs more than a database in a file."""
    compiled = _compiled(table, connection.dialect, tuple(rows[0]))
    if (names := compiled.positiontup) is None:
        parameters: Any = [dict(row) for row in rows]
    else:
        parameters = [tuple([row[name] for name in names]) for row in rows]
    connection.exec_driver_sql(str(compiled), parameters)


@cache
def _compiled(table: Table, dialect: Dialect, names: tuple[str, ...]) -> Any:
    return insert(table).compile(dialect=dialect, column_keys=list(names))


def _sum_up(
    connection: Connection,
    table: Table,
    which: ColumnElement[bool],
    replaced: Mapping[str, ColumnElement[Any]],
) -> None:
    last = connection.execute(select(func.max(table.c.id)).where(which)).scalar()
    if last is None:
        return
    summed = _SUMMED[table]
    names = [c.name for c in table.c if c.name != "id" and c.name not in summed]
    keys = [replaced.get(name, table.c[name]).label(name) for name in names]
    sums = [func.sum(table.c[name]).label(name) for name in summed]
    fixed = [name for name in replaced if isinstance(replaced[name], BindParameter)]
    grouped = [replaced.get(name, table.c[name]) for name in names if name not in fixed]
    rows = select(*keys, *sums).where(which, table.c.id <= last).group_by(*grouped)
    connection.execute(insert(table).from_select([*names, *summed], rows))
    connection.execute(delete(table).where(which, table.c.id <= last))


def _count_sessions(connection: Connection, which: ColumnElement[bool]) -> None:
    week = week_column(USAGE.c.hour)
    for model in (USAGE.c.model, literal("")):
        grouped = [week, USAGE.c.org, *([model] if model is USAGE.c.model else [])]
        counted = (
            select(week, USAGE.c.org, model, func.count(USAGE.c.session.distinct()))
            .where(which)
            .group_by(*grouped)
        )
        names = ["week", "org", "model", "sessions"]
        connection.execute(insert(SESSIONS).from_select(names, counted))


def _equal_share(counts: Mapping[str, int], limit: int) -> int:
    """Return how much each may keep so that all together keep ``limit``: what some leave is shared
    by the others."""
    left, sharing = limit, len(counts)
    for count in sorted(counts.values()):
        if count * sharing > left:
            return left // sharing
        left, sharing = left - count, sharing - 1
    return limit
