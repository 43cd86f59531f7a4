"""The shared-memory files of the CPU tier: whose they are, and which are left over.

An engine that is killed leaves its file behind, and the memory with it. Each process that uses a
region, the scheduler and its workers, therefore shares a lock on a file beside it for as long as it
lives; the kernel lets go of the lock however the process ends, and in whatever container.
"""

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from typing import IO

from vllm_cachescope.logs import logger_of

PREFIX = "cachescope-"
"""Starts the engine id of every region that is ours."""

logger = logger_of(__name__)


def _region(engine_id: str, directory: Path) -> Path:
    # The name vLLM's SharedOffloadRegion gives its file.
    return directory / f"vllm_offload_{engine_id}.mmap"


def claim(engine_id: str, directory: Path = Path("/dev/shm")) -> IO[bytes]:
    """Mark the region of ``engine_id`` as in use until the returned file is closed or the
    process ends. To be called by each process that uses the region, before it makes or opens it.
    """
    path = _region(engine_id, directory).with_suffix(".lock")
    while True:
        lock = open(path, "wb")  # noqa: SIM115
        # Another engine may be looking whether it is stale, and find so and remove it.
        fcntl.flock(lock, fcntl.LOCK_SH)
        if _is_at(lock, path):
            return lock
        lock.close()


def _is_at(lock: IO[bytes], path: Path) -> bool:
    """Whether the file that was opened at ``path`` is still the one there. Only its lock says
    anything about the region, and only who holds it may remove either."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(lock.fileno()), path.stat())
    return False


def release(claimed: IO[bytes]) -> None:
    """Give up what `claim` returned. Where the region is not yet gone, the lock's file stays, for
    `remove_stale` to find."""
    lock_path = Path(claimed.name)
    if not any(lock_path.parent.glob(f"{lock_path.with_suffix('.mmap').name}*")):
        lock_path.unlink(missing_ok=True)
    claimed.close()


def remove_stale(directory: Path = Path("/dev/shm")) -> list[Path]:
    """Remove our regions whose engines are gone; return their paths."""
    removed = []
    for lock_path in directory.glob(f"vllm_offload_{PREFIX}*.lock"):
        region = lock_path.with_suffix(".mmap")
        with suppress(OSError), open(lock_path, "rb") as lock:
            # Fails while any process of the engine lives.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_at(lock, lock_path):
                continue  # Removed by another, and by now perhaps claimed anew.
            # From 0.33 on vLLM may spread a region over several files.
            for left_over in directory.glob(f"{region.name}*"):
                left_over.unlink()
                removed.append(left_over)
                logger.info("Removed %s, which a killed engine had left", left_over)
            lock_path.unlink()
    return removed
