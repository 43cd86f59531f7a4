"""The recent requests in the ledger, of all processes that share it."""

import time
from collections.abc import Callable
from hashlib import sha256

from sqlalchemy import ColumnElement, Engine, or_, select
from sqlalchemy.exc import SQLAlchemyError

from vllm_cachescope.usage.batch import record_of
from vllm_cachescope.usage.database import describe
from vllm_cachescope.usage.names import kept_name
from vllm_cachescope.usage.recent_requests import Numbered, UnavailableError
from vllm_cachescope.usage.tables import REQUESTS

OVERLAP_S = 5.0
"""Rows so recent are listed again. Of several writers the one that began last may be done first,
and a database may give the numbers of purged rows away again."""


class LedgerRequests:
    """The ledger's rows, as `RecentRequests`. Safe for threads; answers may take long.

    Args:
        engine: the ledger's database.
        wall_clock: seconds since the epoch.
    """

    def __init__(self, engine: Engine, wall_clock: Callable[[], float] = time.time) -> None:
        address = engine.url.render_as_string(hide_password=True)
        # The same in each process that shares the ledger.
        self.name = sha256(address.encode("utf-8", "surrogatepass")).hexdigest()[:12]
        self._engine = engine
        self._wall_clock = wall_clock

    def newest(
        self, org: str | None, limit: int, after: int = 0, before: int | None = None
    ) -> list[Numbered]:
        """Return the newest requests; see `RecentRequests`.

        Raises:
            UnavailableError: if the database does not answer.
        """
        c = REQUESTS.c
        which = [] if org is None else [c.org == kept_name(org)]
        if after:
            which.append(or_(c.id > after, c.at > self._wall_clock() - OVERLAP_S))
        if before is not None:
            which.append(c.id < before)
        return self._newest(limit, *which)

    def breaks_elsewhere(self, replica: str, org: str | None, limit: int) -> list[Numbered]:
        """Return the newest breaks that other servers had.

        Args:
            replica: this server's name.
            org: whose; None for everyone's.
            limit: how many at most.

        Raises:
            UnavailableError: if the database does not answer.
        """
        c = REQUESTS.c
        which = [] if org is None else [c.org == kept_name(org)]
        is_break = or_(c.region.is_not(None), c.expected.is_(False))
        return self._newest(limit, is_break, c.replica != kept_name(replica), *which)

    def _newest(self, limit: int, *which: ColumnElement[bool]) -> list[Numbered]:
        rows = select(REQUESTS).where(*which).order_by(REQUESTS.c.id.desc()).limit(limit)
        try:
            with self._engine.connect() as connection:
                return [Numbered(row.id, record_of(row)) for row in connection.execute(rows)]
        except SQLAlchemyError as error:
            raise UnavailableError(describe(error)) from error
