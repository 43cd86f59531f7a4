"""The tables of the ledger."""

from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
)

from vllm_cachescope.usage.names import MAX_KEPT

# SQLite counts rows up by itself only in a column of this very type.
_ID = BigInteger().with_variant(Integer, "sqlite")

METADATA = MetaData()

REQUESTS = Table(
    "cachescope_requests",
    METADATA,
    Column("id", _ID, primary_key=True),
    Column("at", Float(53), nullable=False),
    Column("org", String(MAX_KEPT), nullable=False),
    # Who answers for the organisation, and gives way first if it has most rows.
    Column("account", String(MAX_KEPT), nullable=False),
    Column("session", String(MAX_KEPT)),
    Column("model", String(MAX_KEPT), nullable=False),
    Column("replica", String(MAX_KEPT), nullable=False),
    Column("engine", Integer),
    Column("request_id", String(MAX_KEPT)),
    # The tokens by outcome, scope and TTL, in JSON: read in whole, and never asked for by part.
    Column("tokens", Text, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("prefill_seconds_saved", Float(53)),
    Column("ttft_s", Float(53)),
    Column("lineage", Integer),
    Column("cause", String(64)),
    Column("expected", Boolean, nullable=False),
    Column("region", String(64)),
    Column("path", String(MAX_KEPT)),
    Column("missed_tokens", BigInteger, nullable=False),
    Index("cachescope_requests_at", "at"),
    Index("cachescope_requests_org", "org", "at"),
    Index("cachescope_requests_account", "account", "id"),
)
"""The latest requests, one by one."""


def _of_hours(name: str, *columns: Column[Any]) -> Table:
    """Return a table of sums by hour (its beginning, in seconds since the epoch), organisation,
    session, model and replica, with columns of its own."""
    return Table(
        name,
        METADATA,
        Column("id", _ID, primary_key=True),
        Column("hour", BigInteger, nullable=False),
        Column("org", String(MAX_KEPT), nullable=False),
        Column("session", String(MAX_KEPT), nullable=False),
        Column("model", String(MAX_KEPT), nullable=False),
        Column("replica", String(MAX_KEPT), nullable=False),
        *columns,
        Index(f"{name}_hour", "hour"),
        Index(f"{name}_org", "org", "hour"),
    )


TOKENS = _of_hours(
    "cachescope_tokens",
    Column("outcome", String(64), nullable=False),
    Column("scope", String(16), nullable=False),
    Column("ttl_s", BigInteger, nullable=False),
    Column("tokens", BigInteger, nullable=False),
)
"""Tokens of prompts.

A row is added for what each writer has counted, and rows of one key are summed up later: what is
asked for is always a sum, so that no database's own way to add to a row is needed.
"""

USAGE = _of_hours(
    "cachescope_usage",
    Column("requests", BigInteger, nullable=False),
    Column("breaks", BigInteger, nullable=False),
    Column("missed_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("prefill_seconds_saved", Float(53), nullable=False),
)
"""What else is counted of requests."""

EVICTIONS = _of_hours(
    "cachescope_evictions",
    Column("tier", String(64), nullable=False),
    Column("part", String(16), nullable=False),
    Column("entries", BigInteger, nullable=False),
)
"""Entries evicted before their time, by the part of the organisation in it: suffered, caused, own.
The session is always empty."""

SESSIONS = Table(
    "cachescope_sessions",
    METADATA,
    Column("id", _ID, primary_key=True),
    Column("week", BigInteger, nullable=False),
    Column("org", String(MAX_KEPT), nullable=False),
    # Empty for all models: a session may use several, and counts once.
    Column("model", String(MAX_KEPT), nullable=False),
    Column("sessions", BigInteger, nullable=False),
    Index("cachescope_sessions_week", "week"),
)
"""How many sessions a week had whose rows name none any more."""

JOBS = Table(
    "cachescope_jobs",
    METADATA,
    Column("name", String(32), primary_key=True),
    Column("at", Float(53), nullable=False),
)
"""When each job on these tables was last done, by whichever server."""
