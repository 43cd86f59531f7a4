"""The directory of a disk tier as the threads of one engine share it."""

import fcntl
import itertools
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from vllm_cachescope.cache.quotas import Quotas
from vllm_cachescope.connectors.disk.directory import (
    INDEX,
    LOCK,
    WRITERS,
    Directory,
    value_name,
)
from vllm_cachescope.connectors.disk.index import (
    Entry,
    Index,
    IndexBroken,
    IndexFull,
    identity_of,
)
from vllm_cachescope.connectors.disk.room import to_free
from vllm_cachescope.connectors.disk.upkeep import Upkeep
from vllm_cachescope.connectors.disk.writers import Writer
from vllm_cachescope.logs import logger_of
from vllm_cachescope.tiers.store import StoreFailed, StoreLate, StoreUnfit

logger = logger_of(__name__)

_ROUNDS = 4
"""How often entries are deleted for what is about to come before it is refused."""

_POLL_S = 0.005
_PATIENCE_S = 1.0


@dataclass(frozen=True, slots=True)
class Space:
    """The space that a disk tier may take up.

    Attributes:
        capacity_bytes: bytes that the files of all engines may take up together.
        keep_free_bytes: bytes that are left free on the file system, whoever takes them up.
    """

    capacity_bytes: int
    keep_free_bytes: int


class Backend:
    """A directory, and what else the threads of a tier share. Safe to use from several threads.

    The first thread that connects starts the upkeep; the last one that disconnects ends it.

    Args:
        path: the directory.
        space: how much the tier may take up.
        quotas: what each organisation may hold; None for anything.
        model: the namespace of this engine's entries.
        clock: the tier's clock.
        wall_clock: Unix time in seconds.

    Attributes:
        directory, space, quotas, model, wall_clock: see above.
        upkeep: deletes what has expired, and what is of no use.
    """

    def __init__(
        self,
        path: Path,
        space: Space,
        quotas: Quotas | None,
        model: str,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
    ) -> None:
        self.directory = Directory(path)
        self.space = space
        self.quotas = quotas
        self.model = model
        self._clock = clock
        self.wall_clock = wall_clock
        self._numbers = itertools.count()
        self.upkeep = Upkeep(self)
        # Under the lock.
        self._lock = threading.Lock()
        self._users: set[object] = set()
        self._writer: Writer | None = None
        self._evicted: list[bytes] = []
        self._crowded: list[bytes] = []
        self._counts: Counter[str] = Counter()

    def now_ms(self) -> int:
        """Return Unix time in ms."""
        return int(self.wall_clock() * 1000)

    def wall_ms(self, at: float) -> int:
        """Return a time on the tier's clock, in seconds, as Unix time in ms."""
        return int((self.wall_clock() + at - self._clock()) * 1000)

    def connect(self, user: object, deadline: float) -> Index:
        """Return a connection to the index, for one of the threads that share the directory.

        Args:
            user: stands for the thread; see `disconnect`.
            deadline: until when other processes are waited for.

        Raises:
            StoreFailed: if there is none to be had.
            StoreUnfit: if the tier must not run on this directory.
        """
        index = self.reopened(None, deadline - self._clock())
        try:
            with self._lock:
                self._users.add(user)
                if self._writer is None or not self._writer.is_there():
                    self._writer = Writer(self.directory.path / WRITERS)
                self.upkeep.start()
        except BaseException:
            index.close()
            raise
        return index

    def disconnect(self, user: object) -> None:
        """A thread does not use the directory any more; with the last one the upkeep ends."""
        with self._lock:
            self._users.discard(user)
            if self._users:
                return
            ending, writer, self._writer = self.upkeep.stop(), self._writer, None
        if ending is not None:
            ending.join(_PATIENCE_S)
        if writer is not None:
            writer.end()

    def new_file(self) -> str:
        """Return the name of a file that no value ever had.

        Raises:
            StoreFailed: if nobody has connected.
        """
        writer = self._writer
        if writer is None:
            raise StoreFailed("it is closed")
        return value_name(writer.name, next(self._numbers))

    # The index.

    def is_current(self, index: Index) -> bool:
        """Whether an open index is still the one in the directory."""
        return index.identity == identity_of(self.directory.path / INDEX)

    def reopened(self, index: Index | None, patience_s: float) -> Index:
        """Return a new connection to the index, and close the one there is.

        Args:
            index: the one there is, if any.
            patience_s: how long other processes are waited for, in seconds.

        Raises:
            StoreFailed: if there is none to be had.
            StoreUnfit: if the tier must not run on this directory.
        """
        self.give_up(index)
        self.directory.prepare()
        path = self.directory.path / INDEX
        with self._alone(patience_s):
            self._make_index(path)
            try:
                return Index(path)
            except IndexBroken as error:
                self._begin_anew(path, error)
                return Index(path)

    def give_up(self, index: Index | None, error: Exception | None = None) -> None:
        """Close a connection to the index, and begin the index anew if it is damaged.

        Args:
            index: the connection, if there is one.
            error: why it is given up.
        """
        if index is None:
            return
        with suppress(StoreFailed):
            index.close()
        if isinstance(error, IndexBroken):
            with suppress(StoreFailed), self._alone(_PATIENCE_S):
                if self.is_current(index):
                    self._begin_anew(self.directory.path / INDEX, error)

    def _begin_anew(self, path: Path, error: IndexBroken) -> None:
        logger.warning(
            "The index of the tier in %s is damaged, and begun anew. The tier begins empty: %s",
            self.directory.path,
            error,
        )
        self._drop_index(path)
        self._make_index(path)

    def _make_index(self, path: Path) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            os.close(os.open(path, flags, 0o600))
        except OSError as error:
            raise StoreFailed(f"{path}: {error.strerror}") from error
        found = path.lstat()
        if found.st_uid != os.geteuid() or found.st_nlink != 1:
            raise StoreUnfit(f"{path} belongs to another user, or is a link")

    def _drop_index(self, path: Path) -> None:
        for one in (path, *(path.with_name(path.name + end) for end in ("-wal", "-shm"))):
            with suppress(FileNotFoundError):
                one.unlink()

    @contextmanager
    def _alone(self, patience_s: float) -> Iterator[None]:
        """Let no other process open or begin the index meanwhile."""
        path = self.directory.path / LOCK
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            file = os.open(path, flags, 0o600)
        except OSError as error:
            raise StoreFailed(f"{path}: {error.strerror}") from error
        try:
            while not _locked(file):
                if patience_s <= 0:
                    raise StoreLate("another process is opening the index")
                time.sleep(_POLL_S)
                patience_s -= _POLL_S
            yield
        finally:
            os.close(file)

    # What is deleted.

    def room_missing(self, coming_bytes: int) -> int:
        """Return how many bytes have to be freed on the file system before so many more come."""
        return coming_bytes + self.space.keep_free_bytes - self.directory.usage()[0]

    def make_room(self, index: Index, coming_bytes: int) -> bool:
        """Delete entries until so many bytes may come, as far as the file system's free space goes.
        Return whether they may.

        Raises:
            StoreFailed: if the index or a file resists.
        """
        # Writing down what is deleted takes up room itself, as does whatever else uses the disk.
        for _ in range(_ROUNDS):
            if (wanted := self.room_missing(coming_bytes)) <= 0:
                return True
            try:
                with index.transaction():
                    entries = to_free(index, self.quotas, wanted)
                    index.delete(entries)
                self.remove_files(entries)
            except IndexFull:
                # Not even that can be written down. What has no file is found out by readers.
                entries = to_free(index, self.quotas, wanted)
                self.remove_files(entries)
                with index.transaction():
                    index.delete(entries)
            self.note_crowded(entries)
            if not entries:
                break
        return self.room_missing(coming_bytes) <= 0

    def remove_files(self, entries: Iterable[Entry]) -> None:
        """Delete the files of entries.

        Raises:
            StoreFailed: if one of them stays.
        """
        failure: StoreFailed | None = None
        for entry in entries:
            try:
                self.directory.remove(entry.file)
            except StoreFailed as error:
                failure = error
        if failure is not None:
            raise failure

    # What the tier is told.

    def note_evicted(self, entries: Iterable[Entry]) -> None:
        """Note entries that organisations held beyond their quotas."""
        with self._lock:
            self._evicted += [entry.key for entry in entries if entry.model == self.model]

    def note_crowded(self, entries: Iterable[Entry]) -> None:
        """Note entries that made room for others."""
        with self._lock:
            self._crowded += [entry.key for entry in entries if entry.model == self.model]

    def count(self, what: str, entries: int) -> None:
        """Count entries that were deleted: ``expired`` or ``damaged``."""
        with self._lock:
            self._counts[what] += entries

    def take_evicted(self) -> list[bytes]:
        """Return the keys that `note_evicted` was told of since the last time."""
        with self._lock:
            keys, self._evicted = self._evicted, []
        return keys

    def take_crowded(self) -> list[bytes]:
        """Return the keys that `note_crowded` was told of since the last time."""
        with self._lock:
            keys, self._crowded = self._crowded, []
        return keys

    def take_count(self, what: str) -> int:
        """Return what was counted under ``what`` since the last time."""
        with self._lock:
            return self._counts.pop(what, 0)


def _locked(file: int) -> bool:
    """Lock an open file; return whether nobody else has it locked."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
