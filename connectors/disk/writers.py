"""The writers of a directory: which processes write there, and which have gone.

Each process has a name of its own, and holds a file of that name locked. The system ends the lock
with the process, however it ends. So what a process has left half-written is told from what one is
writing still.
"""

import fcntl
import os
import secrets
from contextlib import suppress
from pathlib import Path

from vllm_cachescope.tiers.store import StoreFailed

_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
_NAME_BYTES = 6


class Writer:
    """This process, as one that writes in a directory.

    Args:
        path: the directory of the writers.

    Attributes:
        name: its name, which no other process ever had here.

    Raises:
        StoreFailed: if it cannot be entered there.
    """

    def __init__(self, path: Path) -> None:
        self.name = secrets.token_hex(_NAME_BYTES)
        self._path = path / self.name
        # Named only once it is locked: an unlocked one with a name has gone.
        unnamed = path / f".{self.name}"
        try:
            self._file = os.open(unnamed, _FLAGS | os.O_CREAT | os.O_EXCL, 0o600)
            fcntl.flock(self._file, fcntl.LOCK_EX)
            os.rename(unnamed, self._path)
        except OSError as error:
            raise StoreFailed(f"{path}: {error.strerror}") from error

    def is_there(self) -> bool:
        """Whether the others can see it still."""
        try:
            return os.lstat(self._path).st_ino == os.fstat(self._file).st_ino
        except OSError:
            return False

    def end(self) -> None:
        """Note that this process writes nothing any more."""
        _unlink(self._path)
        os.close(self._file)


def clear_out(path: Path) -> set[str]:
    """Forget the writers that have gone; return the names of those that are there.

    Args:
        path: the directory of the writers.

    Raises:
        StoreFailed: if they cannot be listed.
    """
    try:
        names = os.listdir(path)
    except OSError as error:
        raise StoreFailed(f"{path}: {error.strerror}") from error
    return {name for name in names if not name.startswith(".") and not _has_gone(path / name)}


def _has_gone(path: Path) -> bool:
    """Whether the writer with this file has gone; forgets it then."""
    try:
        file = os.open(path, _FLAGS)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _unlink(path)
        return True
    except OSError:
        return False
    finally:
        os.close(file)


def _unlink(path: Path) -> None:
    # If it stays, whoever looks next tries again.
    with suppress(OSError):
        os.unlink(path)
