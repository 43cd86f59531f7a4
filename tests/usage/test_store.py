import threading
from collections import Counter
from dataclasses import replace

import pytest
from sqlalchemy import select

from tests.usage.ledgers import KEEP, MONDAY, Books, record, some_records, tokens_of
from vllm_cachescope.usage.database import connect
from vllm_cachescope.usage.ledger_requests import OVERLAP_S, LedgerRequests
from vllm_cachescope.usage.query import TooManyRowsError
from vllm_cachescope.usage.recent_requests import UnavailableError
from vllm_cachescope.usage.store import DAY_S, Store, week_of
from vllm_cachescope.usage.tables import JOBS, METADATA, REQUESTS, SESSIONS, TOKENS, USAGE


def test_records_come_back_as_they_were(books: Books) -> None:
    written = some_records(1, 50)
    books.write(*written)
    now = written[-1].at + 60
    requests = LedgerRequests(books.engine, lambda: now)
    listed = requests.newest(None, 100)
    assert [one.record for one in listed] == written[::-1]
    numbers = [one.number for one in listed]
    assert numbers == sorted(numbers, reverse=True)
    own = [one for one in listed if one.record.org == "name:acme"]
    assert requests.newest("name:acme", 3) == own[:3]
    assert requests.newest(None, 2, before=numbers[10]) == listed[11:13]
    assert requests.newest(None, 100, after=numbers[4]) == listed[:4]
    assert requests.newest("name:acme", 100, numbers[20], numbers[9]) == [
        one for one in listed[10:20] if one.record.org == "name:acme"
    ]
    # What has just come is listed again: another writer's rows may have come in between.
    now = written[-1].at + OVERLAP_S / 2
    latest = [one for one in listed if one.record.at > now - OVERLAP_S]
    assert requests.newest(None, 100, after=numbers[0]) == latest != []


def test_breaks_of_other_servers_are_listed(books: Books) -> None:
    written = some_records(3, 60)
    books.write(*written)
    requests = LedgerRequests(books.engine)
    there = [one for one in written[::-1] if one.replica == "b" and one.is_break]
    assert 5 < len(there) < 60
    assert [one.record for one in requests.breaks_elsewhere("a", None, 100)] == there
    acme = [one for one in there if one.org == "name:acme"]
    assert [one.record for one in requests.breaks_elsewhere("a", "name:acme", 2)] == acme[:2]


def test_replicas_that_start_together_all_have_their_tables(books: Books) -> None:
    engines = [connect(books.engine.url) for _ in range(6)]
    failed: list[Exception] = []

    def create(store: Store, start: threading.Barrier) -> None:
        start.wait()
        try:
            store.create()
        except Exception as error:
            failed.append(error)

    for _ in range(5):
        METADATA.drop_all(books.engine)
        start = threading.Barrier(len(engines))
        threads = [
            threading.Thread(target=create, args=(Store(engine, KEEP), start)) for engine in engines
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failed == []
        assert books.rows(JOBS) == 1
    for engine in engines:
        engine.dispose()


def test_a_database_that_is_away_is_told_of(books: Books) -> None:
    METADATA.drop_all(books.engine)
    with pytest.raises(UnavailableError):
        LedgerRequests(books.engine).newest(None, 1)
    with pytest.raises(UnavailableError):
        LedgerRequests(books.engine).breaks_elsewhere("a", None, 1)


def test_sums_are_those_of_the_records_whatever_is_summed_up_and_when(books: Books) -> None:
    # Written over a year, in pieces, with maintenance of each kind in between.
    written, told = some_records(2, 240, MONDAY, 360 * DAY_S), []
    books.keep(replace(KEEP, max_requests=30, max_session_rows=1000, sessions_for_s=9 * DAY_S))
    for start in range(0, 240, 30):
        piece = written[start : start + 30]
        books.write(*piece)
        told += piece
        assert books.store.maintain(piece[-1].at + 1, 300)
        assert books.tokens() == tokens_of(told)
    (whole,) = books.ask()
    assert whole.totals.requests == 240
    assert whole.totals.breaks == sum(one.is_break for one in told)
    assert whole.totals.output_tokens == sum(one.output_tokens for one in told)
    assert whole.totals.missed_tokens == sum(one.missed_tokens for one in told)
    saved = sum(one.prefill_seconds_saved or 0 for one in told)
    assert whole.totals.prefill_seconds_saved == pytest.approx(saved)
    by_org = {dict(row.key)["org"]: row.totals for row in books.ask("org")}
    for org, totals in by_org.items():
        own = [one for one in told if one.org == org]
        assert totals.prompt_tokens == sum(one.prompt_tokens for one in own)
        assert totals.requests == len(own)
    end = written[-1].at
    assert books.rows(REQUESTS) <= 30
    assert not books.rows(TOKENS, TOKENS.c.session != "", TOKENS.c.hour < end - 16 * DAY_S)
    assert not books.rows(USAGE, USAGE.c.hour % DAY_S != 0, USAGE.c.hour < end - 91 * DAY_S)
    assert books.rows(USAGE, USAGE.c.hour % DAY_S != 0)


def test_rows_of_one_key_become_one(books: Books) -> None:
    for _ in range(5):
        books.write(record())
    assert books.rows(USAGE) == 5
    books.store.maintain(MONDAY + 60, 300)
    assert (books.rows(USAGE), books.rows(TOKENS)) == (1, 3)
    (row,) = books.ask()
    assert (row.totals.requests, row.totals.prompt_tokens) == (5, 625)


def test_one_of_many_does_the_maintenance(books: Books) -> None:
    other = Store(books.engine, KEEP)
    assert books.store.maintain(MONDAY, 300)
    assert not other.maintain(MONDAY + 299, 300)
    assert other.maintain(MONDAY + 300, 300)
    assert not books.store.maintain(MONDAY + 301, 300)


def test_many_write_while_others_sum_up(books: Books) -> None:
    written = [some_records(seed, 60, MONDAY, 3600) for seed in range(3)]
    failures: list[BaseException] = []

    def write(records, store: Books) -> None:
        try:
            for one in records:
                store.write(one)
        except BaseException as error:
            failures.append(error)

    writers = [Books(books.engine.url) for _ in written]
    threads = [
        threading.Thread(target=write, args=pair) for pair in zip(written, writers, strict=True)
    ]
    for thread in threads:
        thread.start()
    now = MONDAY + 10.0
    while any(thread.is_alive() for thread in threads):
        books.store.maintain(now, 0)
        now += 1
    for one in writers:
        one.close()
    assert not failures
    books.store.maintain(now, 0)
    assert books.tokens() == tokens_of([one for records in written for one in records])
    assert books.rows(REQUESTS) == 180


def test_the_busiest_organisation_loses_its_oldest_requests_first(books: Books) -> None:
    books.keep(replace(KEEP, max_requests=10))
    books.write(*(record(MONDAY + i, "name:quiet") for i in range(3)))
    # Made-up keys are one account, however many they are.
    books.write(*(record(MONDAY + i, f"key:{i:016x}") for i in range(50)))
    books.write(*(record(MONDAY + i, "name:loud") for i in range(50)))
    books.store.maintain(MONDAY + 100, 300)
    with books.engine.connect() as connection:
        left = Counter(connection.execute(select(REQUESTS.c.account)).scalars())
        newest = connection.execute(
            select(REQUESTS.c.at).where(REQUESTS.c.account == "name:loud")
        ).scalars()
        assert left == {"name:quiet": 3, "unlisted": 3, "name:loud": 3}
        assert sorted(newest) == [MONDAY + 47, MONDAY + 48, MONDAY + 49]


def test_requests_become_too_old(books: Books) -> None:
    books.write(record(MONDAY), record(MONDAY + DAY_S))
    books.store.maintain(MONDAY + 7.5 * DAY_S, 300)
    assert books.rows(REQUESTS) == 1


def test_a_purge_takes_requests_and_sessions_and_leaves_what_is_billed(books: Books) -> None:
    written = [
        record(session=session, org=org) for org in ("name:acme", "name:b") for session in "xyz"
    ]
    books.write(*written)
    books.store.purge("name:acme", "x")
    sessions = {tuple(dict(row.key).values()) for row in books.ask("org", "session")}
    assert sessions == {
        ("name:acme", ""),
        *(("name:acme", s) for s in "yz"),
        *(("name:b", s) for s in "xyz"),
    }
    assert books.rows(REQUESTS) == 5
    books.store.purge("name:acme")
    assert books.rows(REQUESTS, REQUESTS.c.org == "name:acme") == 0
    assert books.rows(TOKENS, TOKENS.c.session != "", TOKENS.c.org == "name:acme") == 0
    assert books.rows(TOKENS, TOKENS.c.session != "", TOKENS.c.org == "name:b") == 9
    books.store.purge(None)
    assert books.rows(REQUESTS) == books.rows(USAGE, USAGE.c.session != "") == 0
    assert books.tokens() == tokens_of(written)
    assert books.rows(SESSIONS, SESSIONS.c.model == "") > 0


@pytest.mark.parametrize("name", ["a" * 5000, "\ud800", "nul \0 byte", "日本 \U0001f600", "'; --"])
def test_any_name_is_kept(books: Books, name: str) -> None:
    books.write(record(session=name, org=f"header:{name}", model=name, request_id=name))
    (row,) = books.ask("org", "session", org=f"header:{name}", session=name, model=name)
    assert row.totals.prompt_tokens == 125
    books.store.purge(f"header:{name}", name)
    assert not books.ask("session", session=name)


def test_made_up_names_are_bounded(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_cachescope.usage.name_limits.MAX_SESSIONS", 3)
    monkeypatch.setattr("vllm_cachescope.usage.name_limits.MAX_MADE_UP", 4)
    books.write(*(record(org=f"key:{i:016x}", session=None) for i in range(9)))
    books.write(*(record(org="name:loud", session=str(i)) for i in range(9)))
    books.write(record(org="name:quiet"))
    orgs = {dict(row.key)["org"]: row.totals.requests for row in books.ask("org")}
    assert orgs.pop("unlisted") == 5
    assert orgs == {**{f"key:{i:016x}": 1 for i in range(4)}, "name:loud": 9, "name:quiet": 1}
    loud = {
        dict(row.key)["session"]: row.totals.requests
        for row in books.ask("session", org="name:loud")
    }
    monkeypatch.setattr("vllm_cachescope.usage.name_limits.MAX_MODELS", 2)
    books.write(*(record(model=f"adapter {i}") for i in range(4)))
    models = {dict(row.key)["model"]: row.totals.requests for row in books.ask("model")}
    assert models == {"toy": 19, "adapter 0": 1, "(other models)": 3}
    assert loud == {"0": 1, "1": 1, "2": 1, "": 6}


def test_an_answer_is_bounded(books: Books) -> None:
    books.write(*(record(session=str(i)) for i in range(5)))
    assert len(books.ask("session", max_rows=5)) == 5
    with pytest.raises(TooManyRowsError, match="more than 4 rows"):
        books.ask("session", max_rows=4)


def test_weeks_begin_on_monday() -> None:
    assert week_of(MONDAY) == MONDAY
    assert week_of(MONDAY - 1) == MONDAY - 7 * DAY_S
    assert week_of(MONDAY + 7 * DAY_S - 1) == MONDAY
