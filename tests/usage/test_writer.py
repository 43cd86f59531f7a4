import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import URL
from sqlalchemy.exc import DataError

from tests.usage.ledgers import KEEP, MONDAY, Books, record, tokens_of
from vllm_cachescope.usage import writer as module
from vllm_cachescope.usage.database import connect
from vllm_cachescope.usage.name_limits import NameLimits
from vllm_cachescope.usage.store import Store
from vllm_cachescope.usage.tables import REQUESTS, TOKENS, USAGE
from vllm_cachescope.usage.writer import Writer


class Writing:
    """A writer of a database of its own, and what it counts."""

    def __init__(self, path: Path) -> None:
        self.url = URL.create("sqlite", database=str(path))
        self.counts: Counter[str] = Counter()
        self.refused: list[Exception] = []
        self._engine = connect(self.url)
        self.writer = Writer(self._open, NameLimits(), self._count, lambda: MONDAY, 0.01)

    def _open(self) -> Store:
        store = Store(self._engine, KEEP)
        store.create()
        if self.refused:
            write = store.write

            def refuse(batch) -> None:
                if self.refused:
                    raise self.refused.pop()
                write(batch)

            store.write = refuse  # type: ignore[method-assign]
        return store

    def _count(self, outcome: str, records: int) -> None:
        self.counts[outcome] += records

    def until(self, **counts: int) -> None:
        deadline = time.monotonic() + 10
        while self.counts != counts and time.monotonic() < deadline:
            time.sleep(0.01)
        assert self.counts == counts


@pytest.fixture
def writing(tmp_path: Path) -> Iterator[Writing]:
    writing = Writing(tmp_path / "ledger.db")
    yield writing
    writing.writer.close()


def test_what_is_left_is_written_when_the_process_ends(writing: Writing) -> None:
    records = [record(MONDAY + i) for i in range(10)]
    writing.writer.start()
    for one in records:
        writing.writer.put(one)
    writing.writer.close()
    books = Books(writing.url)
    assert books.tokens() == tokens_of(records)
    assert writing.counts == {"written": 10}
    books.close()


def test_a_full_queue_drops_and_counts(writing: Writing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUEUE", 3)
    for _ in range(5):
        writing.writer.put(record())
    assert writing.counts == {"dropped": 2}
    writing.writer.start()
    writing.until(written=3, dropped=2)


def test_a_database_that_is_away_costs_one_line_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    away = tmp_path / "not yet" / "ledger.db"
    writing = Writing(away)
    caplog.set_level("INFO")
    writing.writer.start()
    began = time.monotonic()
    for _ in range(3):
        writing.writer.put(record())
        time.sleep(0.05)
    assert time.monotonic() - began < 5  # of SQLite's patience with others it has none
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "cannot be written" in caplog.text
    away.parent.mkdir()
    writing.writer.purge("nobody")  # also wakes it
    writing.until(written=3)
    writing.writer.close()
    assert [r.levelname for r in caplog.records] == ["WARNING", "INFO"]


def test_what_the_database_refuses_is_counted_and_the_rest_goes_on(
    writing: Writing, caplog: pytest.LogCaptureFixture
) -> None:
    writing.refused.append(DataError("insert", {}, ValueError("a secret of the row")))
    writing.writer.put(record())
    writing.writer.start()
    writing.until(failed=1)
    writing.writer.put(record())
    writing.until(failed=1, written=1)
    assert [r.levelname for r in caplog.records] == ["WARNING"]


def test_a_locked_database_is_waited_for(writing: Writing) -> None:
    Books(writing.url).close()
    other = sqlite3.connect(writing.url.database or "", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    writing.writer.put(record())
    writing.writer.start()
    time.sleep(0.3)
    assert not writing.counts
    other.execute("COMMIT")
    other.close()
    writing.until(written=1)


def test_a_purge_comes_after_what_was_before_it(writing: Writing) -> None:
    writing.writer.put(record(session="gone"))
    writing.writer.purge("name:acme", "gone")
    writing.writer.start()
    writing.until(written=1)
    writing.writer.close()
    books = Books(writing.url)
    assert books.rows(REQUESTS) == 0
    assert books.rows(TOKENS, TOKENS.c.session == "") == 3
    assert books.rows(USAGE, USAGE.c.session == "") == 1
    books.close()


def test_purges_that_wait_are_bounded(writing: Writing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PURGES", 2)
    for session in "abcd":
        writing.writer.purge("name:acme", session)
    assert list(writing.writer.purges) == [
        ("name:acme", "a"),
        ("name:acme", "b"),
        ("name:acme", None),
    ]
