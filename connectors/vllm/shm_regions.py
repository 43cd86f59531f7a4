"""The shared-memory files of the CPU tier ("regions"), and the removal of stale ones.

An engine that is killed leaves its region's file in ``/dev/shm``, and the memory is not freed. Each
process that uses a region (the scheduler and its workers) therefore holds a shared lock on a second
file beside it, ``vllm_offload_<engine id>.lock``. The kernel releases the lock when the process
ends, however it ends and in whatever container. A region whose file is locked by nobody is stale.
"""

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

from vllm_cachescope.logs import logger_of

PREFIX = "cachescope-"
"""The beginning of the engine id of each of our regions."""

logger = logger_of(__name__)


def _region(engine_id: str, directory: Path) -> Path:
    # The name vLLM's SharedOffloadRegion gives its file.
    return directory / f"vllm_offload_{engine_id}.mmap"


def claim(engine_id: str, directory: Path = Path("/dev/shm")) -> IO[bytes]:
    """Claim the region of ``engine_id`` until the returned file is closed or the process ends.

    To be called by each process that uses the region, before it makes or opens the region.

    Raises:
        OSError: if something else is in the way of the lock's file.
    """
    path = _region(engine_id, directory).with_suffix(".lock")
    while True:
        lock = _open(path, os.O_RDONLY | os.O_CREAT)
        # Until the lock is held, another engine may take the file for stale and remove it.
        fcntl.flock(lock, fcntl.LOCK_SH)
        if _is_at(lock, path):
            return lock
        lock.close()


def _open(path: Path, access: int) -> IO[bytes]:
    """Open a lock's file, which must be a regular file of our own user: anyone may put a file, a
    link or a FIFO of any name into shared memory.

    Raises:
        OSError: if it is anything else.
    """

    def opener(name: str, _: int) -> int:
        # A FIFO would keep us waiting for its other end.
        return os.open(name, access | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)

    file = open(path, "rb", buffering=0, opener=opener)  # noqa: SIM115
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
        file.close()
        raise PermissionError(f"{path} is no regular file of user {os.geteuid()}")
    return file


def _is_at(lock: IO[bytes], path: Path) -> bool:
    """Whether the locked file is still the one at ``path``. A lock on a removed file says nothing
    about the region."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(lock.fileno()), path.stat())
    return False


def release(claimed: IO[bytes]) -> None:
    """Release the claim that `claim` returned.

    The lock's file is removed if the region is. Otherwise it stays: by it `remove_stale` finds the
    region.
    """
    lock_path = Path(claimed.name)
    if not any(lock_path.parent.glob(f"{lock_path.with_suffix('.mmap').name}*")):
        lock_path.unlink(missing_ok=True)
    claimed.close()


def remove_stale(directory: Path = Path("/dev/shm")) -> list[Path]:
    """Remove our regions that no process uses any more; return their paths."""
    removed = []
    for lock_path, files in _stale(directory):
        with suppress(OSError):
            for file in files:
                file.unlink()
                removed.append(file)
                logger.info("Removed %s, which a killed engine had left", file)
            lock_path.unlink()
    return removed


def stale_bytes(directory: Path = Path("/dev/shm")) -> int:
    """Return how many bytes `remove_stale` would free."""
    return sum(
        file.stat().st_blocks * 512
        for _, files in _stale(directory)
        for file in files
        if file.exists()
    )


def _stale(directory: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Yield the lock's file of each region that no process uses, locked, with the region's own
    files."""
    for lock_path in directory.glob(f"vllm_offload_{PREFIX}*.lock"):
        region = lock_path.with_suffix(".mmap")
        with suppress(OSError), _open(lock_path, os.O_RDONLY) as lock:
            # Raises BlockingIOError while any process of the engine lives.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another process may have removed the file; a new one may be claimed by now.
            if _is_at(lock, lock_path):
                # From 0.33 on vLLM may spread a region over several files.
                yield lock_path, list(directory.glob(f"{region.name}*"))
