"""Evictions in the ledger: who lost entries to whom, for every organisation."""

from prometheus_client import CollectorRegistry
from sqlalchemy import inspect, text
from sqlalchemy.exc import OperationalError

from tests.usage.ledgers import KEEP, MONDAY, Books, record
from vllm_cachescope.api.ledger_service import UNKNOWN, LedgerService
from vllm_cachescope.cli.usage_tables import usage_table
from vllm_cachescope.config import LedgerSettings
from vllm_cachescope.tenancy.caller import CallerDirectory
from vllm_cachescope.tenancy.owner_tags import UNLISTED_TAG, OwnerTags
from vllm_cachescope.usage.evictions import MAX_PENDING, PendingEvictions, rows_of
from vllm_cachescope.usage.name_limits import NameLimits
from vllm_cachescope.usage.prices import Prices
from vllm_cachescope.usage.query import Query
from vllm_cachescope.usage.store import DAY_S, Store
from vllm_cachescope.usage.tables import EVICTIONS
from vllm_cachescope.usage.usage_ledger import UsageLedger
from vllm_cachescope.usage.writer import Writer

SECRET = b"a secret of the tests"


def write(books: Books, at: float, *counts: tuple[str, str, int]) -> None:
    """Write evictions of the CPU tier: organisation, part, entries."""
    pending = PendingEvictions()
    for org, part, entries in counts:
        pending.add(at, org, "toy", "a", "cpu", part, entries)
    books.store.write_evictions(rows_of(pending.take(), NameLimits()))


def parts(books: Books, *by: str, **only: str) -> dict[tuple[str, ...], tuple[int | None, ...]]:
    found = {}
    for row in books.ask(*by, **only):
        shown = row.to_dict()
        values = tuple(shown[f"evictions_{part}"] for part in ("suffered", "caused", "own"))
        found[tuple(shown[name] for name in by)] = values
    return found


def test_each_organisations_part_is_told(books: Books) -> None:
    write(books, MONDAY, ("name:quiet", "suffered", 7), ("name:loud", "caused", 7))
    write(books, MONDAY + 5, ("name:loud", "own", 2), ("name:quiet", "suffered", 1))
    books.write(record(org="name:quiet"))
    by_org = {("name:loud",): (0, 7, 2), ("name:quiet",): (8, 0, 0)}
    assert parts(books, "org") == by_org
    assert parts(books) == {(): (8, 7, 2)}
    assert parts(books, org="name:loud") == {(): (0, 7, 2)}
    # Tokens can be told apart by scope; evictions cannot.
    assert all(values == (None, None, None) for values in parts(books, "scope").values())


def test_sums_are_kept_as_those_of_tokens_are(books: Books) -> None:
    for minute in range(3):
        write(books, MONDAY + 60 * minute, ("name:quiet", "suffered", 1))
    assert books.rows(EVICTIONS) == 3
    books.store.maintain(MONDAY + 3600, 0)
    assert books.rows(EVICTIONS) == 1 and parts(books) == {(): (3, 0, 0)}
    books.store.maintain(MONDAY + KEEP.days_for_s + 2 * DAY_S, 0)
    assert books.rows(EVICTIONS) == 0


def test_a_ledger_of_before_gets_the_table(books: Books) -> None:
    books.write(record())
    with books.engine.begin() as connection:
        connection.execute(text("DROP TABLE cachescope_evictions"))
    Store(books.engine, KEEP).create()
    assert inspect(books.engine).has_table("cachescope_evictions")
    write(books, MONDAY, ("name:quiet", "suffered", 1))
    assert parts(books, "org")["name:quiet",] == (1, 0, 0)


def test_what_the_database_does_not_take_waits(books: Books) -> None:
    class Away:
        def __init__(self) -> None:
            self.is_away, self.written = True, 0

        def write_evictions(self, rows: list[dict[str, object]]) -> None:
            if self.is_away:
                raise OperationalError("INSERT", {}, Exception("away"))
            self.written += sum(row["entries"] for row in rows)

        def maintain(self, now: float, every_s: float) -> bool:
            return False

    away = Away()
    writer = Writer(lambda: away, NameLimits(), lambda end, count: None)  # type: ignore[arg-type]
    writer.evictions.add(MONDAY, "name:quiet", "toy", "a", "cpu", "suffered", 4)
    assert not writer._work()  # noqa: SLF001
    away.is_away = False
    assert writer._work() and away.written == 4  # noqa: SLF001


def test_tags_of_engines_become_organisations(tmp_path) -> None:
    tags = OwnerTags(SECRET)
    settings = LedgerSettings(directory=tmp_path / "ledger")
    directory = CallerDirectory(SECRET, {}, None)
    service = LedgerService(
        settings, Prices(), directory, CollectorRegistry(), "toy", "a", SECRET, lambda: MONDAY
    )
    for org in ("name:acme", "key:0123456789abcdef"):
        service.put(record(org=org), None)
    service.put_evictions(
        [
            ("cpu", "suffered", tags.prefix("name:acme"), 3),
            ("device", "suffered", tags.prefix("name:acme"), 2),
            ("cpu", "caused", tags.prefix("key:0123456789abcdef", is_listed=False), 4),
            ("cpu", "suffered", tags.prefix("global"), 5),
            ("cpu", "own", tags.prefix("name:never seen"), 6),
            ("cpu", "own", UNLISTED_TAG, 7),
        ]
    )
    service.close()
    ledger = UsageLedger(settings, Prices(), lambda end, count: None)
    answer = ledger.answer(Query(MONDAY - 1, MONDAY + 1, ("org",)))
    ledger.close()
    found = {
        row["org"]: (row["evictions_suffered"], row["evictions_caused"], row["evictions_own"])
        for row in answer["rows"]
    }
    assert found == {
        "name:acme": (5, 0, 0),
        "key:0123456789abcdef": (0, 4, 0),
        "global": (5, 0, 0),
        UNKNOWN: (0, 0, 6),
        "unlisted": (0, 0, 7),
    }
    names = [column.header for column in usage_table(answer).columns]
    assert {"evicted by others", "evicted of others"} <= set(names)


def test_made_up_organisations_cost_a_bounded_memory() -> None:
    pending = PendingEvictions()
    for number in range(60_000):
        pending.add(MONDAY, f"org {number}", "toy", "a", "cpu", "own", 1)
    assert len(pending.take()) == MAX_PENDING
