"""The ledger of one server: takes records in, and answers what was used."""

from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection

from vllm_cachescope.config.ledger import LedgerSettings
from vllm_cachescope.tenancy.shares import AccountOf, own_account
from vllm_cachescope.usage.database import address, connect, make_private
from vllm_cachescope.usage.evictions import PendingEvictions
from vllm_cachescope.usage.ledger_requests import LedgerRequests
from vllm_cachescope.usage.name_limits import NameLimits
from vllm_cachescope.usage.period import format_time
from vllm_cachescope.usage.phases import phases, weeks_by_model
from vllm_cachescope.usage.prices import Prices
from vllm_cachescope.usage.query import MAX_ROWS, Query, ask
from vllm_cachescope.usage.record import RequestRecord
from vllm_cachescope.usage.store import Retention, Store
from vllm_cachescope.usage.totals import Totals
from vllm_cachescope.usage.writer import Writer


class UsageLedger:
    """A ledger that records are put into. Answers are given on the caller's thread, and may take
    long.

    Args:
        settings: where it is kept, and for how long.
        prices: what tokens cost.
        count: takes note of what became of records; see `Writer`.
        account_of: returns who answers for an organisation.

    Raises:
        ConfigError: if the database's address cannot be used.
    """

    def __init__(
        self,
        settings: LedgerSettings,
        prices: Prices,
        count: Callable[[str, int], None],
        account_of: AccountOf = own_account,
    ) -> None:
        url = address(settings)
        self._engine = connect(url)
        self._prices = prices
        retention = retention_of(settings)

        def open_store() -> Store:
            make_private(url)
            store = Store(self._engine, retention)
            store.create()
            return store

        self._writer = Writer(open_store, NameLimits(account_of), count)
        self._writer.start()

    def put(self, record: RequestRecord) -> None:
        """Leave a record to be written within a second or two. Never blocks."""
        self._writer.put(record)

    @property
    def evictions(self) -> PendingEvictions:
        """Where evictions are left to be written, within a second or two."""
        return self._writer.evictions

    def purge(self, org: str | None, session: str | None = None) -> None:
        """Have an organisation's or a session's requests forgotten; see `Store.purge`. Never
        blocks."""
        self._writer.purge(org, session)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
        self._engine.dispose()

    @property
    def requests(self) -> LedgerRequests:
        """The recent requests."""
        return LedgerRequests(self._engine)

    def answer(self, query: Query) -> dict[str, Any]:
        """Return what was used, as plain data for JSON.

        Raises:
            TooManyRowsError: if there are too many rows.
            SQLAlchemyError: if the database does not answer.
        """
        with self._engine.connect() as connection:
            return usage_of(connection, query, self._prices)

    def phases(self, query: Query) -> dict[str, Any]:
        """Return the phases of use, as plain data for JSON; raises as `answer` does."""
        with self._engine.connect() as connection:
            return phases_of(connection, query)


def retention_of(settings: LedgerSettings) -> Retention:
    """Return how much the ledger keeps, and for how long."""
    return Retention(
        settings.max_requests,
        settings.requests_for,
        settings.sessions_for,
        settings.max_session_rows,
        settings.hours_for,
        settings.days_for,
    )


def usage_of(
    connection: Connection, query: Query, prices: Prices, max_rows: int = MAX_ROWS
) -> dict[str, Any]:
    """Return what was used, as plain data for JSON: rows, and their sum where there are several.

    Raises:
        TooManyRowsError: if there are more than ``max_rows`` rows.
    """
    rows = ask(connection, query, prices, max_rows)
    totals = [row.totals for row in ask(connection, query.total(), prices)]
    return {
        **_head(query),
        "currency": prices.currency if prices.models else None,
        "rows": [row.to_dict() for row in rows],
        "total": (totals or [Totals(requests=0)])[0].to_dict(),
    }


def phases_of(connection: Connection, query: Query) -> dict[str, Any]:
    """Return the phases of use, as plain data for JSON: by model, or of all models together.

    Raises:
        ValueError: if the query asks to be split by anything but the model.
    """
    if query.by not in ((), ("model",)):
        raise ValueError("by: phases are by model, or of all models together")
    weeks = weeks_by_model(connection, query, bool(query.by))
    return {
        **_head(query),
        "models": [
            {"model": model, "phases": [phase.to_dict() for phase in phases(of_model)]}
            for model, of_model in sorted(weeks.items(), key=lambda item: item[0] or "")
        ],
    }


def _head(query: Query) -> dict[str, Any]:
    return {
        "since": format_time(query.since),
        "until": format_time(query.until),
        "by": list(query.by),
    }
