"""The upkeep of a disk tier: deletes what has expired, and repairs what processes left behind."""

import threading
from typing import TYPE_CHECKING

from vllm_cachescope.connectors.disk.directory import WRITERS, writer_in
from vllm_cachescope.connectors.disk.index import AT_ONCE, Index
from vllm_cachescope.connectors.disk.writers import clear_out
from vllm_cachescope.logs import logger_of
from vllm_cachescope.tiers.store import StoreFailed, StoreUnfit

if TYPE_CHECKING:
    from vllm_cachescope.connectors.disk.backend import Backend

logger = logger_of(__name__)

PAUSE_S = 1.0
"""How often it works, in seconds."""

REPAIR_S = 600.0
"""How often the files are compared with the index, in seconds; at the start, too."""

PATIENCE_S = 5.0
"""How long other processes are waited for, in seconds."""

UNFINISHED_S = 600.0
"""After so many seconds without a change no process is still writing a file."""


class Upkeep:
    """A thread beside those of a tier.

    Args:
        backend: the directory. The thread uses it as its other threads do.
    """

    def __init__(self, backend: "Backend") -> None:
        self._backend = backend
        self._thread: tuple[threading.Thread, threading.Event] | None = None

    def start(self) -> None:
        """Start the thread, if there is none."""
        if self._thread is None:
            stop = threading.Event()
            thread = threading.Thread(
                target=self._run, args=(stop,), name="cachescope-disk-upkeep", daemon=True
            )
            self._thread = thread, stop
            thread.start()

    def stop(self) -> threading.Thread | None:
        """Have the thread end; return it, if there is one."""
        if self._thread is None:
            return None
        (thread, stop), self._thread = self._thread, None
        stop.set()
        return thread

    def work(self, index: Index) -> None:
        """Delete what has expired, keep the file system's free space, and bring the index to the
        disk.

        Raises:
            StoreFailed: if something of that cannot be done now.
        """
        index.wait_for(PATIENCE_S)
        while expired := index.pop_expired(self._backend.now_ms()):
            self._backend.remove_files(expired)
            self._backend.count("expired", len(expired))
            if len(expired) < AT_ONCE:
                break
        self._backend.make_room(index, 0)
        index.checkpoint()

    def repair(self, index: Index) -> None:
        """Delete files that are in no entry, unless a process is writing them, and entries whose
        files are gone.

        Raises:
            StoreFailed: if something of that cannot be done now.
        """
        backend = self._backend
        index.wait_for(PATIENCE_S)
        before = index.files()
        there = set(backend.directory.names())
        writing = clear_out(backend.directory.path / WRITERS)
        unnamed = there - before.keys()
        if unnamed:
            # What has been entered meanwhile has a name by now.
            unnamed -= index.files().keys()
        now = backend.now_ms() / 1000
        damaged = 0
        for name in unnamed:
            if writer_in(name) in writing:
                age_s = backend.directory.age_s(name, now)
                if age_s is None or age_s < UNFINISHED_S:
                    continue
            backend.directory.remove(name)
            damaged += 1
        lost = {name: before[name] for name in before.keys() - there}
        damaged += index.forget(lost)
        if damaged:
            logger.info(
                "%d files or entries in %s were left half-written, or lost their other half, and "
                "are deleted",
                damaged,
                backend.directory.path,
            )
        backend.count("damaged", damaged)

    def _run(self, stop: threading.Event) -> None:
        index: Index | None = None
        repair_in_s = 0.0
        while not stop.is_set():
            try:
                if index is None or not self._backend.is_current(index):
                    index = self._backend.reopened(index, PATIENCE_S)
                    repair_in_s = 0.0
                self.work(index)
                if repair_in_s <= 0:
                    self.repair(index)
                    repair_in_s = REPAIR_S
            except (StoreFailed, StoreUnfit) as error:
                logger.info("What has expired is not deleted for now: %s", error)
                self._backend.give_up(index, error)
                index = None
            except Exception as error:
                logger.exception("What has expired is not deleted for now")
                self._backend.give_up(index, error)
                index = None
            stop.wait(PAUSE_S)
            repair_in_s -= PAUSE_S
        self._backend.give_up(index)
