"""Sessions that move between servers, or API processes, which share a directory and no Redis."""

import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.redis.test_session_notes import ACME, SECRET, Conversation, Replica
from vllm_cachescope.connectors.disk import DiskNoteStore
from vllm_cachescope.connectors.disk.note_store import NOTES
from vllm_cachescope.connectors.vllm import local_notes
from vllm_cachescope.tenancy.scope import Caller
from vllm_cachescope.tiers.keyspace import secret_digest
from vllm_cachescope.tiers.note_store import BOUNDS, NoteBounds, NoteName

OTHER = Caller("name:other", "s")


@pytest.fixture
def start(place) -> Iterator[Callable[..., Replica]]:
    replicas: list[Replica] = []

    def starting(name: str, bounds: NoteBounds = BOUNDS, **options: Any) -> Replica:
        digest = secret_digest(options.get("secret", SECRET))
        stores = partial(DiskNoteStore, place, digest, time.monotonic, time.time, bounds)
        replicas.append(Replica("", name, stores=stores, **options))
        return replicas[-1]

    yield starting
    for one in replicas:
        one.exchange.close()


@pytest.fixture
def store(place, wall) -> Iterator[DiskNoteStore]:
    store = DiskNoteStore(place, b"digest", time.monotonic, wall, NoteBounds(3, 10_000, 4, 5_000))
    store.connect(soon())
    yield store
    store.close()


def soon() -> float:
    return time.monotonic() + 5


def named(session: int, org: bytes = b"o" * 16, account: bytes = b"a") -> NoteName:
    return NoteName(account, org, b"%016d" % session)


def put(store: DiskNoteStore, name: NoteName, *notes: bytes, size: int = 10) -> None:
    store.write(name, {note: note.ljust(size) for note in notes}, [], 3600, soon())


async def test_a_session_that_moves_goes_on(start):
    a, b = start("a"), start("b")
    said = Conversation().turn()
    await a.ask(said)
    await a.ask(said, OTHER)
    a.wrote(2)
    seen = await b.ask(said.turn())
    assert (seen.kind, seen.cause) == ("continuation", "other_replica")
    b.wrote(1)
    a.diagnoser.purge("name:acme")
    assert await a.diagnoser.purged() is None
    c = start("c")
    assert (await c.ask(said)).kind == "first_request"
    assert (await c.ask(said, OTHER)).kind == "continuation"
    c.wrote(2)
    a.diagnoser.purge(None)
    assert await a.diagnoser.purged() is None
    assert (await start("d").ask(said, OTHER)).kind == "first_request"


async def test_who_has_another_secret_learns_nothing(start):
    a, b = start("a"), start("b", secret=b"another secret, which is long")
    await a.ask(Conversation().turn())
    a.wrote(1)
    assert (await b.ask(Conversation().turn())).kind == "first_request"
    assert (await start("c").ask(Conversation().turn())).kind == "retry"


async def test_a_damaged_database_is_begun_anew(start, place):
    a = start("a")
    await a.ask(Conversation().turn())
    a.wrote(1)
    a.exchange.close()
    for path in place.glob(f"{NOTES}*"):
        path.write_bytes(b"no database" * 1000)
    b = start("b")
    assert (await b.ask(Conversation().turn())).kind == "first_request"
    b.wrote(1)
    assert (await start("c").ask(Conversation().turn())).kind == "retry"


async def test_a_directory_that_others_may_read_is_not_used(start, place):
    place.mkdir()
    place.chmod(0o755)
    a = start("a")
    assert (await a.ask(Conversation().turn())).kind == "first_request"
    assert list(place.iterdir()) == []


def test_notes_are_bounded_and_expire(store, wall):
    put(store, named(1), b"a", b"b")
    put(store, named(1), b"c", b"d", b"e", b"f")
    assert store.read(named(1), soon()).keys() == {b"c", b"d", b"e", b"f"}
    store.write(named(1), {b"g": b"g"}, [b"d", b"e"], 3600, soon())
    assert store.read(named(1), soon()).keys() == {b"c", b"f", b"g"}
    put(store, named(2), b"a", b"b", b"c", size=2000)
    assert store.read(named(2), soon()).keys() == {b"b", b"c"}
    # The first to expire go first, and nobody else's.
    put(store, named(9, account=b"other"), b"a")
    for i in (3, 4):
        wall.advance(1)
        put(store, named(i), b"a", size=100)
    assert [bool(store.read(named(i), soon())) for i in (1, 2, 3, 4)] == [False, True, True, True]
    wall.advance(1)
    put(store, named(5), b"a", size=4800)
    put(store, named(6), b"a", size=4800)
    held = [i for i in range(1, 7) if store.read(named(i), soon())]
    assert held == [4, 5, 6] or held == [5, 6]
    assert store.read(named(9, account=b"other"), soon())
    wall.advance(3601)
    assert not store.read(named(6), soon())


def test_a_purge_finds_an_organisations_sessions(store):
    mine, theirs = named(1), named(1, org=b"p" * 16)
    for name in (mine, named(2), theirs):
        put(store, name, b"a")
    store.drop(mine, soon())
    assert not store.read(mine, soon()) and store.read(named(2), soon())
    store.drop(NoteName(b"a", b"o" * 16, b""), soon())
    assert not store.read(named(2), soon()) and store.read(theirs, soon())


def test_the_local_directory_is_one_servers_and_goes_with_it(tmp_path: Path):
    dead = tmp_path / f"cachescope-sessions-{os.geteuid()}-{2**22 + 1}"
    dead.mkdir()
    (tmp_path / f"cachescope-sessions-{os.geteuid()}-notes").mkdir()
    path = local_notes.claim(tmp_path)
    assert path == local_notes.claim(tmp_path) and path.name.endswith(f"-{os.getppid()}")
    assert [one.name for one in tmp_path.iterdir()] == [f"cachescope-sessions-{os.geteuid()}-notes"]


async def test_a_server_knows_itself_by_its_session(start):
    """What was noted is not asked for again."""
    a = start("a")
    for _ in range(3):
        await a.ask(Conversation().turn(), ACME)
    assert a.counted("none") == 1
