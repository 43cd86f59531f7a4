"""The store of notes on sessions in a directory, for servers and API processes of one machine: an
SQLite database, beside the index of a disk tier or by itself."""

import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from vllm_cachescope.connectors.disk.directory import trouble_with
from vllm_cachescope.logs import logger_of
from vllm_cachescope.tiers.note_store import (
    BOUNDS,
    NOTE_BYTES,
    NoteBounds,
    NoteName,
    NoteStore,
)
from vllm_cachescope.tiers.store import StoreFailed

NOTES = "sessions-1.db"
"""The name of the database; the number grows with every change of what stands in it."""

AT_ONCE = 100
"""How many expired sessions are deleted with each write."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS notes (
  secret BLOB NOT NULL,
  session BLOB NOT NULL,
  name BLOB NOT NULL,
  sealed BLOB NOT NULL,
  PRIMARY KEY (secret, session, name)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS sessions (
  secret BLOB NOT NULL,
  session BLOB NOT NULL,
  account BLOB NOT NULL,
  ends_ms INTEGER NOT NULL,
  nbytes INTEGER NOT NULL,
  PRIMARY KEY (secret, session)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS sessions_account ON sessions (secret, account, ends_ms);
CREATE INDEX IF NOT EXISTS sessions_end ON sessions (ends_ms);
"""

_BROKEN = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

logger = logger_of(__name__)


class DiskNoteStore(NoteStore):
    """One thread's way to the notes in a directory.

    Args:
        directory: where they are; made if it is not there.
        secret_digest: tells our secret from others; see `keyspace.secret_digest`.
        clock: seconds, never running backwards; the clock of deadlines.
        wall_clock: Unix time in seconds, the clock that replicas share.
        bounds: how many notes are kept.
    """

    def __init__(
        self,
        directory: Path,
        secret_digest: bytes,
        clock: Callable[[], float],
        wall_clock: Callable[[], float] = time.time,
        bounds: NoteBounds = BOUNDS,
    ) -> None:
        self.address = str(directory)
        self._directory = directory
        self._path = directory / NOTES
        self._secret = secret_digest
        self._clock = clock
        self._wall_clock = wall_clock
        self._bounds = bounds
        self._database: sqlite3.Connection | None = None

    def alive(self) -> bool:
        return self._database is not None and self._path.exists()

    def connect(self, deadline: float) -> None:
        self.close()
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if trouble := trouble_with(self._directory, self._directory.lstat()):
                raise StoreFailed(trouble)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            os.close(os.open(self._path, flags, 0o600))
        except OSError as error:
            raise StoreFailed(f"{self._path}: {error.strerror}") from error
        with self._used(deadline, connects=True) as database:
            database.execute("PRAGMA journal_mode = WAL")
            # Nobody waits for the disk: what a power failure takes is a diagnosis.
            database.execute("PRAGMA synchronous = OFF")
            database.execute("PRAGMA trusted_schema = OFF")
            database.executescript(_SCHEMA)

    def close(self) -> None:
        if self._database is not None:
            with suppress(sqlite3.Error):
                self._database.close()
            self._database = None

    def ahead_s(self, deadline: float) -> float:
        return self._wall_clock() - self._clock()

    def read(self, name: NoteName, deadline: float) -> Mapping[bytes, bytes]:
        with self._used(deadline) as database:
            rows = database.execute(
                "SELECT name, sealed FROM notes JOIN sessions USING (secret, session) "
                "WHERE secret = ? AND session = ? AND ends_ms > ?",
                (self._secret, name.org + name.session, self._now_ms()),
            )
            return {bytes(note): bytes(sealed) for note, sealed in rows}

    def write(
        self,
        name: NoteName,
        notes: Mapping[bytes, bytes],
        obsolete: Sequence[bytes],
        ttl_s: float,
        deadline: float,
    ) -> None:
        session, now_ms = name.org + name.session, self._now_ms()
        with self._used(deadline) as database:
            expired = database.execute(
                "SELECT secret, session FROM sessions WHERE ends_ms <= ? LIMIT ?",
                (now_ms, AT_ONCE),
            ).fetchall()
            self._delete(database, expired)
            place = self._secret, session
            database.executemany(
                "DELETE FROM notes WHERE secret = ? AND session = ? AND name = ?",
                [(*place, one) for one in obsolete],
            )
            database.executemany(
                "INSERT OR REPLACE INTO notes VALUES (?, ?, ?, ?)",
                [(*place, one, sealed) for one, sealed in notes.items()],
            )
            nbytes = self._trimmed(database, place)
            database.execute(
                "INSERT INTO sessions VALUES (?, ?, ?, ?, ?) ON CONFLICT (secret, session) DO "
                "UPDATE SET nbytes = excluded.nbytes, ends_ms = max(ends_ms, excluded.ends_ms)",
                (*place, name.account, now_ms + int(ttl_s * 1000), nbytes),
            )
            self._keep_bounds(database, name.account)

    def _trimmed(self, database: sqlite3.Connection, place: tuple[bytes, bytes]) -> int:
        """Keep the latest notes on a session; return how many bytes they are."""
        rows = database.execute(
            "SELECT name, length(sealed) FROM notes WHERE secret = ? AND session = ? "
            "ORDER BY name DESC",
            place,
        ).fetchall()
        nbytes, kept = 0, 0
        for note, length in rows:
            more = length + NOTE_BYTES
            is_full = kept == self._bounds.notes or nbytes + more > self._bounds.session_bytes
            if kept and is_full:
                database.execute(
                    "DELETE FROM notes WHERE secret = ? AND session = ? AND name <= ?",
                    (*place, note),
                )
                break
            nbytes, kept = nbytes + more, kept + 1
        return nbytes

    def _keep_bounds(self, database: sqlite3.Connection, account: bytes) -> None:
        of_account = self._secret, account
        count, nbytes = database.execute(
            "SELECT count(*), sum(nbytes) FROM sessions WHERE secret = ? AND account = ?",
            of_account,
        ).fetchone()
        if count <= self._bounds.sessions and nbytes <= self._bounds.nbytes:
            return
        over = []
        for session, size in database.execute(
            "SELECT session, nbytes FROM sessions WHERE secret = ? AND account = ? "
            "ORDER BY ends_ms",
            of_account,
        ):
            if count <= self._bounds.sessions and nbytes <= self._bounds.nbytes:
                break
            over.append((self._secret, session))
            count, nbytes = count - 1, nbytes - size
        self._delete(database, over)

    def drop(self, name: NoteName, deadline: float) -> None:
        prefix = name.org + name.session
        with self._used(deadline) as database:
            rows = database.execute(
                "SELECT DISTINCT secret, session FROM notes WHERE secret = ? AND session >= ? "
                "AND substr(session, 1, ?) = ?",
                (self._secret, prefix, len(prefix), prefix),
            ).fetchall()
            self._delete(database, rows)

    def drop_all(self, deadline: float) -> None:
        with self._used(deadline) as database:
            for table in ("notes", "sessions"):
                database.execute(f"DELETE FROM {table} WHERE secret = ?", (self._secret,))

    def _delete(
        self, database: sqlite3.Connection, sessions: Sequence[tuple[bytes, bytes]]
    ) -> None:
        for table in ("notes", "sessions"):
            delete = f"DELETE FROM {table} WHERE secret = ? AND session = ?"
            database.executemany(delete, sessions)

    def _now_ms(self) -> int:
        return int(self._wall_clock() * 1000)

    @contextmanager
    def _used(self, deadline: float, connects: bool = False) -> Iterator[sqlite3.Connection]:
        """Use the database, in one transaction but where it connects.

        Raises:
            StoreFailed: if something of that cannot be done now.
        """
        try:
            if connects:
                self._database = sqlite3.connect(
                    self._path, isolation_level=None, check_same_thread=False
                )
            database = self._database
            if database is None:
                raise StoreFailed("it is closed")
            patience_ms = max(1, int((deadline - self._clock()) * 1000))
            database.execute(f"PRAGMA busy_timeout = {patience_ms}")
            if connects:
                yield database
                return
            database.execute("BEGIN IMMEDIATE")
            yield database
            database.execute("COMMIT")
        except sqlite3.Error as error:
            self.close()
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in _BROKEN:
                logger.warning("The notes in %s are damaged, and begun anew", self._path)
                for end in ("", "-wal", "-shm"):
                    with suppress(OSError):
                        self._path.with_name(self._path.name + end).unlink()
            raise StoreFailed(f"{self._path}: {error}") from error
        except BaseException:
            self.close()
            raise
