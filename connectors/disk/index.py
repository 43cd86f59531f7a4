"""The index of a disk tier: which entries there are, whose, until when, and in which files.

It is an SQLite database beside the files. Readers never wait for writers there (WAL), a process
that is killed leaves it whole, and what organisations hold is counted once for all processes. After
a power failure it may lack the last entries, as nobody waits for the disk when one is written.
"""

import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_cachescope.tiers.store import StoreFailed, StoreLate

AT_ONCE = 1000
"""How many entries one transaction deletes: some 10 ms, for which other writers wait."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
  id INTEGER PRIMARY KEY,
  key BLOB NOT NULL,
  model TEXT NOT NULL,
  account BLOB NOT NULL,
  ends_ms INTEGER NOT NULL,
  lease BLOB NOT NULL,
  file TEXT NOT NULL,
  payload_bytes INTEGER NOT NULL,
  file_bytes INTEGER NOT NULL
);
CREATE UNIQUE INDEX IF NOT EXISTS entries_key ON entries (key, model);
CREATE INDEX IF NOT EXISTS entries_account ON entries (account, ends_ms);
CREATE INDEX IF NOT EXISTS entries_end ON entries (ends_ms);
CREATE TABLE IF NOT EXISTS held (
  account BLOB PRIMARY KEY,
  entries INTEGER NOT NULL,
  payload_bytes INTEGER NOT NULL,
  file_bytes INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TRIGGER IF NOT EXISTS entered AFTER INSERT ON entries BEGIN
  INSERT INTO held VALUES (new.account, 1, new.payload_bytes, new.file_bytes)
  ON CONFLICT (account) DO UPDATE SET entries = entries + 1,
    payload_bytes = payload_bytes + new.payload_bytes, file_bytes = file_bytes + new.file_bytes;
END;
CREATE TRIGGER IF NOT EXISTS left_it AFTER DELETE ON entries BEGIN
  UPDATE held SET entries = entries - 1, payload_bytes = payload_bytes - old.payload_bytes,
    file_bytes = file_bytes - old.file_bytes WHERE account = old.account;
  DELETE FROM held WHERE account = old.account AND entries <= 0;
END;
CREATE TABLE IF NOT EXISTS secrets (
  model TEXT PRIMARY KEY,
  digest BLOB NOT NULL,
  until_ms INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS notices (
  secret BLOB NOT NULL,
  position INTEGER NOT NULL,
  entry BLOB NOT NULL,
  PRIMARY KEY (secret, position)
) WITHOUT ROWID;
CREATE UNIQUE INDEX IF NOT EXISTS notices_entry ON notices (secret, entry);
CREATE TABLE IF NOT EXISTS followers (
  secret BLOB NOT NULL,
  follower BLOB NOT NULL,
  claim BLOB NOT NULL,
  heard_us INTEGER NOT NULL,
  PRIMARY KEY (secret, follower)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS cuts (secret BLOB PRIMARY KEY, position INTEGER NOT NULL) WITHOUT ROWID;
"""

_PRAGMAS = (
    "PRAGMA journal_mode = WAL",
    "PRAGMA synchronous = NORMAL",
    # Only the upkeep waits for the disk; see `Index.checkpoint`.
    "PRAGMA wal_autocheckpoint = 0",
    "PRAGMA temp_store = MEMORY",
    # 16 MiB of each thread's: half of the index of 100,000 entries.
    "PRAGMA cache_size = -16384",
    "PRAGMA trusted_schema = OFF",
)

_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL}
_FULL = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR}
_BROKEN = {
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_SCHEMA,
    # A file ends before what it should have: no disk is full, and no second try finds more.
    sqlite3.SQLITE_IOERR_SHORT_READ,
}


class IndexFull(StoreFailed):
    """Nothing can be written to the index; it may be readable."""


class IndexBroken(StoreFailed):
    """The index is no index any more."""


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry as the index has it.

    Attributes:
        id: its number in the index, which no later entry has while it is there.
        key: see `keyspace.qualified`.
        model: the namespace of its model.
        account: see `Quotas.account_of`.
        ends_ms: when it expires, in ms of Unix time.
        lease: its lease; see `leases`.
        file: the name of its file.
        payload_bytes: bytes of its block.
        file_bytes: bytes that its file takes up on the disk.
    """

    id: int
    key: bytes
    model: str
    account: bytes
    ends_ms: int
    lease: bytes
    file: str
    payload_bytes: int
    file_bytes: int


_COLUMNS = "id, key, model, account, ends_ms, lease, file, payload_bytes, file_bytes"


class Index:
    """One thread's connection to the index.

    Every method raises `StoreLate` if other processes keep the index for longer than the patience,
    `IndexFull` if it cannot be written to, `IndexBroken` if it is damaged, and otherwise
    `StoreFailed`.

    Args:
        path: the file, which is there.

    Attributes:
        identity: tells the file from another one in its place.
    """

    def __init__(self, path: Path) -> None:
        self.identity = identity_of(path)
        with _explained():
            self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            try:
                self.wait_for(1.0)
                for pragma in _PRAGMAS:
                    self._database.execute(pragma)
                self._database.executescript(_SCHEMA)
            except sqlite3.Error:
                self._database.close()
                raise

    def close(self) -> None:
        """Close the connection."""
        with _explained():
            self._database.close()

    def wait_for(self, seconds: float) -> None:
        """Set how long each of the following calls waits for other processes at most."""
        patience_ms = max(1, int(seconds * 1000))
        with _explained():
            self._database.execute(f"PRAGMA busy_timeout = {patience_ms}")

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Do several things as one: all, or none if something is raised."""
        with _explained():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise

    def run(self, statement: str, *values: object) -> list[Any]:
        """Run a statement on what stands beside the entries; return the rows that it finds."""
        with _explained():
            return self._database.execute(statement, values).fetchall()

    def checkpoint(self) -> None:
        """Bring what was written into the database proper. This waits for the disk."""
        with _explained():
            self._database.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    # Entries of one model.

    def find(self, model: str, keys: Iterable[bytes], now_ms: int) -> dict[bytes, Entry]:
        """Return those of ``keys`` that have time left."""
        asked = f"SELECT {_COLUMNS} FROM entries WHERE key = ? AND model = ? AND ends_ms > ?"
        found: dict[bytes, Entry] = {}
        with _explained():
            for key in keys:
                row = self._database.execute(asked, (key, model, now_ms)).fetchone()
                if row is not None:
                    found[key] = Entry(*row)
        return found

    def enter(self, entry: Entry, now_ms: int) -> tuple[bool, list[Entry]]:
        """Add an entry, whose number counts for nothing. To be called in a transaction.

        Returns:
            Whether it was added: another process may have been faster. And an earlier one that had
            expired, whose place it takes.
        """
        identity = entry.key, entry.model
        old = self._delete("key = ? AND model = ? AND ends_ms <= ?", (*identity, now_ms))
        new = self._database.execute(
            f"INSERT OR IGNORE INTO entries ({_COLUMNS}) VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *identity,
                entry.account,
                entry.ends_ms,
                entry.lease,
                entry.file,
                entry.payload_bytes,
                entry.file_bytes,
            ),
        )
        return new.rowcount == 1, old

    def prolong(self, renewals: Sequence[tuple[int, bytes, int]]) -> None:
        """Let entries live longer.

        Args:
            renewals: for each the end in ms of Unix time, the lease until then, and the number.
        """
        if not renewals:
            return
        with self.transaction():
            self._database.executemany(
                "UPDATE entries SET ends_ms = ?1, lease = ?2 WHERE id = ?3 AND ends_ms < ?1",
                renewals,
            )

    # Entries of all models.

    def first(self) -> Iterator[Entry]:
        """Yield all entries, the first to expire first. Nothing may be written meanwhile."""
        with _explained():
            rows = self._database.execute(f"SELECT {_COLUMNS} FROM entries ORDER BY ends_ms, id")
            for row in rows:
                yield Entry(*row)

    def first_of(self, account: bytes) -> Iterator[Entry]:
        """Yield the entries of an account, the first to expire first. Nothing may be written
        meanwhile."""
        asked = f"SELECT {_COLUMNS} FROM entries WHERE account = ? ORDER BY ends_ms, id"
        with _explained():
            for row in self._database.execute(asked, (account,)):
                yield Entry(*row)

    def owned(self, prefix: bytes) -> list[Entry]:
        """Return some of the entries whose keys begin with ``prefix``, as many as are deleted at
        once."""
        asked = f"SELECT {_COLUMNS} FROM entries WHERE key >= ? AND substr(key, 1, ?) = ? LIMIT ?"
        with _explained():
            rows = self._database.execute(asked, (prefix, len(prefix), prefix, AT_ONCE))
            return [Entry(*row) for row in rows]

    def delete(self, entries: Iterable[Entry]) -> int:
        """Delete entries; return how many there were still. To be called in a transaction."""
        # Of no parameters at all the number would be -1.
        return max(
            0,
            self._database.executemany(
                "DELETE FROM entries WHERE id = ? AND file = ?",
                [(entry.id, entry.file) for entry in entries],
            ).rowcount,
        )

    def forget(self, files: Mapping[str, int]) -> int:
        """Delete the entries of some files, with their numbers; return how many were there."""
        if not files:
            return 0
        with self.transaction():
            return self._database.executemany(
                "DELETE FROM entries WHERE id = ? AND file = ?",
                [(number, file) for file, number in files.items()],
            ).rowcount

    def pop_expired(self, now_ms: int) -> list[Entry]:
        """Delete some entries that have expired, as many as are deleted at once; return them."""
        with self.transaction():
            return self._delete(
                "id IN (SELECT id FROM entries WHERE ends_ms <= ? ORDER BY ends_ms LIMIT ?)",
                (now_ms, AT_ONCE),
            )

    def _delete(self, which: str, values: Sequence[object]) -> list[Entry]:
        asked = f"DELETE FROM entries WHERE {which} RETURNING {_COLUMNS}"
        return [Entry(*row) for row in self._database.execute(asked, values).fetchall()]

    # Sums.

    def held(self) -> dict[bytes, int]:
        """Return how many bytes of blocks each account holds."""
        with _explained():
            return dict(self._database.execute("SELECT account, payload_bytes FROM held"))

    def held_by(self, account: bytes) -> int:
        """Return how many bytes of blocks an account holds."""
        with _explained():
            row = self._database.execute(
                "SELECT payload_bytes FROM held WHERE account = ?", (account,)
            ).fetchone()
        return int(row[0]) if row else 0

    def file_bytes(self) -> int:
        """Return how many bytes all files take up."""
        with _explained():
            asked = "SELECT coalesce(sum(file_bytes), 0) FROM held"
            return int(self._database.execute(asked).fetchone()[0])

    def files(self) -> dict[str, int]:
        """Return the names of all files, each with its entry's number."""
        with _explained():
            return dict(self._database.execute("SELECT file, id FROM entries"))

    # Secrets.

    def claim(self, model: str, digest: bytes, now_ms: int, until_ms: int) -> bytes:
        """Note that engines of a model use the secret with this digest, unless others use another
        one now. Return the digest that counts."""
        with self.transaction():
            self._database.execute(
                "INSERT INTO secrets VALUES (?1, ?2, ?4) ON CONFLICT (model) DO UPDATE "
                "SET digest = ?2, until_ms = ?4 WHERE digest = ?2 OR until_ms <= ?3",
                (model, digest, now_ms, until_ms),
            )
            asked = "SELECT digest FROM secrets WHERE model = ?"
            return bytes(self._database.execute(asked, (model,)).fetchone()[0])

    def claimed(self, model: str, now_ms: int) -> bytes | None:
        """Return the digest of the secret that engines of a model use now; None if none does."""
        asked = "SELECT digest FROM secrets WHERE model = ? AND until_ms > ?"
        with _explained():
            row = self._database.execute(asked, (model, now_ms)).fetchone()
        return bytes(row[0]) if row else None

    def digests(self, now_ms: int) -> set[bytes]:
        """Return the digests of the secrets that engines use now, of whatever model."""
        asked = "SELECT digest FROM secrets WHERE until_ms > ?"
        with _explained():
            return {bytes(row[0]) for row in self._database.execute(asked, (now_ms,))}


def identity_of(path: Path) -> tuple[int, int] | None:
    """Return what tells a file from another one in its place; None if it is not there."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
        # The lower byte tells the kind; some of a kind are named by themselves.
        names = {code, code & 0xFF}
        if names & _BUSY:
            raise StoreLate("another process holds the index") from error
        kind = IndexBroken if names & _BROKEN else IndexFull if names & _FULL else StoreFailed
        raise kind(f"its index: {error}") from error
