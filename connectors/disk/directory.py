"""The directory of a disk tier: who may be in it, the files of values, how much room is left.

::

    index-1.sqlite      which entries there are; see `index`
    lock-1              is held while the index is opened
    writers-1/WRITER    a file that its process holds locked; see `writers`
    values-1/XX/WRITER-N
                        a value: its header and its payload. XX spreads them over 256 directories.
                        The index and the code name it XX/WRITER-N

A file of a value is written once, under a name that no other one ever has, and never changed. It
counts once the index names it. What the index does not name is half of a value, or one that was
about to be deleted.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from vllm_cachescope.tiers.envelope import HEADER_BYTES
from vllm_cachescope.tiers.store import Misfit, StoreFailed, StoreUnfit

LAYOUT = 1
"""Grows with every change to what stands in the directory; other layouts are left alone."""

INDEX = f"index-{LAYOUT}.sqlite"
WRITERS = f"writers-{LAYOUT}"
VALUES = f"values-{LAYOUT}"
LOCK = f"lock-{LAYOUT}"

_SHARDS = 256
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Directory:
    """A directory that belongs to this user alone. Safe to use from several threads.

    Args:
        path: where it is; made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._values = f"{path}/{VALUES}"

    def prepare(self) -> None:
        """Make the directory and what has to be in it, unless it is there.

        Raises:
            StoreFailed: if that cannot be done now.
            StoreUnfit: if somebody else could read or change what is in it.
        """
        for path in (self.path, self.path / WRITERS, self.path / VALUES):
            try:
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            except FileExistsError:
                raise StoreUnfit(f"{path} is no directory") from None
            except OSError as error:
                raise StoreFailed(f"{path}: {error.strerror}") from error
            self.check(path)

    def is_there(self) -> bool:
        """Whether there is anything of its name."""
        return os.path.lexists(self.path)

    def check(self, path: Path) -> None:
        """Check that nobody but this user may use a directory.

        Raises:
            StoreFailed: if that cannot be told.
            StoreUnfit: if somebody may.
        """
        try:
            found = path.lstat()
        except OSError as error:
            raise StoreFailed(f"{path}: {error.strerror}") from error
        if trouble := trouble_with(path, found):
            raise StoreUnfit(trouble)

    def usage(self) -> tuple[int, int]:
        """Return how many bytes are free on the file system for this user, and how many it has.

        Raises:
            StoreFailed: if that cannot be told.
        """
        try:
            found = os.statvfs(self.path)
        except OSError as error:
            raise StoreFailed(f"{self.path}: {error.strerror}") from error
        return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize

    # Values.

    def write(self, name: str, head: bytes, payload: memoryview) -> None:
        """Write a value to a file of its own.

        Raises:
            OSError: if it cannot be written. Nothing is left of it then.
        """
        path = self._path(name)
        try:
            file = os.open(path, _WRITE, 0o600)
        except FileNotFoundError:
            with suppress(FileExistsError):
                os.mkdir(os.path.dirname(path), 0o700)
            file = os.open(path, _WRITE, 0o600)
        try:
            try:
                _write_all(file, head, payload)
            finally:
                # Some file systems tell only now that there is no room.
                os.close(file)
        except BaseException:
            self.remove(name)
            raise

    def open(self, name: str) -> int | None:
        """Open a value, and have the disk begin to read it; None if it is not there.

        Raises:
            StoreFailed: if it may not be opened.
        """
        try:
            file = os.open(self._path(name), _READ)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if error.errno == errno.ELOOP:
                return None  # A link. `remove` deletes it, not what it points to.
            raise StoreFailed(f"{self.path}: {error.strerror}") from error
        with suppress(OSError):
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED)
        return file

    def read(self, file: int, slot: memoryview) -> bytes | Misfit:
        """Read the payload of an open value into ``slot``; return its header, or why this cannot be
        a value."""
        try:
            found = os.fstat(file)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
                return Misfit.TYPE
            length = HEADER_BYTES + slot.nbytes
            if found.st_size != length:
                return Misfit.LENGTH
            head = bytearray(HEADER_BYTES)
            done = os.preadv(file, [head, slot], 0)
            while done < length:
                # The system reads 2 GiB at once, and less where a signal comes in between.
                more = os.preadv(file, [slot[max(0, done - HEADER_BYTES) :]], done)
                if done < HEADER_BYTES or not more:
                    return Misfit.LENGTH
                done += more
        except OSError:
            return Misfit.UNREADABLE
        return bytes(head)

    def close(self, file: int) -> None:
        """Close an open value."""
        os.close(file)

    def remove(self, name: str) -> None:
        """Delete the file of a value, if it is there.

        Raises:
            StoreFailed: if it stays.
        """
        try:
            os.unlink(self._path(name))
        except (FileNotFoundError, NotADirectoryError):
            pass
        except IsADirectoryError:
            pass  # It is none of ours, and in nobody's way: no name is used twice.
        except OSError as error:
            raise StoreFailed(f"{self.path}: {error.strerror}") from error

    def age_s(self, name: str, now: float) -> float | None:
        """Return for how many seconds a file has not changed; None if it is not there.

        Args:
            name: the file.
            now: Unix time in seconds.
        """
        try:
            return now - os.lstat(self._path(name)).st_mtime
        except OSError:
            return None

    def names(self) -> Iterator[str]:
        """Yield the names of all files that could be values, from all processes.

        Raises:
            StoreFailed: if they cannot be listed.
        """
        try:
            with os.scandir(self._values) as shards:
                found = [shard.name for shard in shards if shard.is_dir(follow_symlinks=False)]
            for shard in found:
                with os.scandir(f"{self._values}/{shard}") as files:
                    yield from [
                        f"{shard}/{file.name}"
                        for file in files
                        if not file.is_dir(follow_symlinks=False)
                    ]
        except OSError as error:
            raise StoreFailed(f"{self.path}: {error.strerror}") from error

    def _path(self, name: str) -> str:
        return f"{self._values}/{name}"


def value_name(writer: str, number: int) -> str:
    """Return the name of the file of the value that a writer writes as its ``number``-th."""
    return f"{number % _SHARDS:02x}/{writer}-{number:x}"


def writer_in(name: str) -> str:
    """Return who has written the value with this file's name."""
    return name.partition("/")[2].partition("-")[0]


def trouble_with(path: Path, found: os.stat_result) -> str | None:
    """Return why what ``path`` leads to is not a directory of this user alone; None if it is.

    Args:
        path: the path.
        found: what is there, links not followed.
    """
    if stat.S_ISLNK(found.st_mode):
        return f"{path} is a symbolic link; name the directory itself"
    if not stat.S_ISDIR(found.st_mode):
        return f"{path} is no directory"
    if found.st_uid != os.geteuid():
        return f"{path} belongs to another user (uid {found.st_uid})"
    if (mode := stat.S_IMODE(found.st_mode)) & 0o077:
        return f"{path} is open to others (mode {mode:o}); allowed: 700"
    return None


def _write_all(file: int, head: bytes, payload: memoryview) -> None:
    length, done = len(head) + payload.nbytes, os.writev(file, [head, payload])
    while done < length:
        if done < len(head):
            done += os.writev(file, [head[done:], payload])
        else:
            done += os.write(file, payload[done - len(head) :])
