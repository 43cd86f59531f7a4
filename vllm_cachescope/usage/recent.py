"""The latest requests that the ledger holds one by one."""

from sqlalchemy import Connection, select

from vllm_cachescope.usage.batch import record_of
from vllm_cachescope.usage.names import kept_name
from vllm_cachescope.usage.record import RequestRecord
from vllm_cachescope.usage.tables import REQUESTS


def recent(
    connection: Connection,
    limit: int,
    org: str | None = None,
    replica: str | None = None,
    before: float | None = None,
) -> list[RequestRecord]:
    """Return the latest requests, newest first.

    Args:
        connection: to the ledger's database.
        limit: how many at most.
        org: whose; None for everyone's.
        replica: of which server; None for all.
        before: only those over before this time, in seconds since the epoch; None for all.
    """
    c = REQUESTS.c
    statement = select(REQUESTS).order_by(c.at.desc(), c.id.desc()).limit(limit)
    if org is not None:
        statement = statement.where(c.org == kept_name(org))
    if replica is not None:
        statement = statement.where(c.replica == kept_name(replica))
    if before is not None:
        statement = statement.where(c.at < before)
    return [record_of(row) for row in connection.execute(statement)]
