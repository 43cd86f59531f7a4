"""Ledgers of the tests, and records to write into them."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from sqlalchemy import URL, func, select

from vllm_cachescope.cache.report import Row
from vllm_cachescope.tenancy.scope import Scope
from vllm_cachescope.usage.batch import Batch
from vllm_cachescope.usage.database import connect
from vllm_cachescope.usage.name_limits import NameLimits
from vllm_cachescope.usage.prices import Prices
from vllm_cachescope.usage.query import Query, UsageRow, ask
from vllm_cachescope.usage.record import RequestRecord
from vllm_cachescope.usage.store import DAY_S, Retention, Store
from vllm_cachescope.usage.tables import TOKENS

MONDAY = 1_793_577_600
"""2026-11-02, 0:00 UTC."""

KEEP = Retention(100_000, 7 * DAY_S, 35 * DAY_S, 2_000_000, 90 * DAY_S, 800 * DAY_S)


def record(at: float = MONDAY, org: str = "name:acme", **fields: object) -> RequestRecord:
    """Return a record with 100 tokens read from the CPU tier, 20 created, 5 uncached."""
    rows = (
        Row("read_cpu", Scope.ORG, 300, 100),
        Row("created", Scope.ORG, 300, 20),
        Row("uncached", Scope.SESSION, 0, 5),
    )
    made = RequestRecord(at, org, "s", "toy", "a", 0, "chatcmpl-1", rows, 7, 0.5, 0.1)
    return replace(made, **fields)  # type: ignore[arg-type]


def some_records(
    seed: int, count: int, since: float = MONDAY, span_s: int = 3 * DAY_S
) -> list[RequestRecord]:
    """Return records of a random mix, in the order of their times."""
    chance = random.Random(seed)
    outcomes = ("read_device", "read_cpu", "read_redis", "created", "uncached")
    keys = [(o, s, t) for o in outcomes for s in Scope for t in (0, 60, 300, 3600, 86400)]
    made = []
    for at in sorted(chance.uniform(since, since + span_s) for _ in range(count)):
        chosen = chance.sample(keys, chance.randint(1, 6))
        rows = tuple(Row(*key, chance.randint(1, 5000)) for key in chosen)
        made.append(
            record(
                at,
                chance.choice(["name:acme", "name:other", "key:0123456789abcdef", "anonymous"]),
                session=chance.choice([None, "one", "two", "three"]),
                model=chance.choice(["toy", "large"]),
                replica=chance.choice(["a", "b"]),
                rows=rows,
                expected=chance.random() < 0.8,
                missed_tokens=chance.randint(0, 100),
                output_tokens=chance.randint(0, 100),
                prefill_seconds_saved=chance.choice([None, 0.25]),
            )
        )
    return made


def tokens_of(records: Sequence[RequestRecord]) -> Counter[tuple[str, str, int]]:
    """Return the tokens of records by outcome, scope and TTL."""
    counts: Counter[tuple[str, str, int]] = Counter()
    for one in records:
        for row in one.rows:
            counts[row.outcome, row.scope.label, row.ttl_s] += row.tokens
    return counts


class Books:
    """A ledger with its store, and what is in it."""

    def __init__(self, url: URL, keep: Retention = KEEP) -> None:
        self.engine = connect(url)
        self.store = Store(self.engine, keep)
        self.store.create()
        self._limits = NameLimits(lambda org: "unlisted" if org.startswith("key:") else org)

    def close(self) -> None:
        self.engine.dispose()

    def write(self, *records: RequestRecord) -> None:
        self.store.write(Batch.of(records, self._limits))

    def keep(self, keep: Retention) -> None:
        self.store = Store(self.engine, keep)

    def tokens(self) -> Counter[tuple[str, str, int]]:
        """Return all tokens by outcome, scope and TTL."""
        key = (TOKENS.c.outcome, TOKENS.c.scope, TOKENS.c.ttl_s)
        statement = select(*key, func.sum(TOKENS.c.tokens)).group_by(*key)
        with self.engine.connect() as connection:
            return Counter({(o, s, t): int(n) for o, s, t, n in connection.execute(statement)})

    def rows(self, table, *which) -> int:
        with self.engine.connect() as connection:
            return connection.execute(
                select(func.count()).select_from(table).where(*which)
            ).scalar_one()

    def ask(
        self,
        *by: str,
        since: float = MONDAY,
        until: float = MONDAY + 900 * DAY_S,
        prices: Prices | None = None,
        max_rows: int = 10_000,
        **only: str,
    ) -> list[UsageRow]:
        with self.engine.connect() as connection:
            query = Query(since, until, by, **only)  # type: ignore[arg-type]
            return ask(connection, query, prices or Prices(), max_rows)
