"""The writer of the ledger: a thread that writes what requests leave in its queue."""

import threading
import time
from collections import deque
from collections.abc import Callable
from multiprocessing.util import Finalize

from sqlalchemy.exc import InterfaceError, OperationalError

from vllm_cachescope.logs import logger_of
from vllm_cachescope.usage.batch import Batch
from vllm_cachescope.usage.database import describe
from vllm_cachescope.usage.evictions import PendingEvictions, rows_of
from vllm_cachescope.usage.name_limits import NameLimits
from vllm_cachescope.usage.record import RequestRecord
from vllm_cachescope.usage.store import Store

logger = logger_of(__name__)

QUEUE = 20_000
"""How many records wait at most: about 20 MB. What comes then is dropped, and counted."""

MAX_PURGES = 10_000
"""How many purges wait at most; further ones are of an organisation as a whole."""

BATCH = 2000
"""How many records are written at once."""

INTERVAL_S = 2.0
"""How long records are collected for."""

MAINTAIN_S = 300.0
"""How often the tables are looked after, by any of the processes that share them."""

LAST_S = 3.0
"""How long the last records may take when the process ends."""

_LONGEST_PAUSE_S = 60.0


class Writer:
    """Writes records on a thread of its own, so that no request waits for a database.

    Args:
        open_store: makes the store, tables included. Called on the thread, and again if it fails.
        limits: how many names sums may have.
        count: takes note of how many records came to which end: ``written``, ``dropped`` if the
            queue was full, ``failed`` if the database refused them.
        wall_clock: seconds since the epoch.
        interval_s: how long records are collected for.

    Attributes:
        purges: organisations and sessions that wait to be purged, in order.
        evictions: evictions that wait to be written.
    """

    def __init__(
        self,
        open_store: Callable[[], Store],
        limits: NameLimits,
        count: Callable[[str, int], None],
        wall_clock: Callable[[], float] = time.time,
        interval_s: float = INTERVAL_S,
    ) -> None:
        self._open_store = open_store
        self._store: Store | None = None
        self._limits = limits
        self._count = count
        self._wall_clock = wall_clock
        self._interval_s = interval_s
        self._queue: deque[RequestRecord] = deque()
        # Those that wait for the records in front of them: a purge is of what was before.
        self.purges: dict[tuple[str | None, str | None], None] = {}
        self.evictions = PendingEvictions()
        self._wake = threading.Event()
        self._is_closed = False
        self._is_failing = False
        self._thread = threading.Thread(target=self._run, name="cachescope-ledger", daemon=True)

    def start(self) -> None:
        """Start the thread, and have what is left written when the process ends."""
        self._thread.start()
        # Not `atexit`, which is passed over in a process that `multiprocessing` has started, as
        # vLLM starts its API processes where there are several.
        Finalize(None, self.close, exitpriority=0)

    def put(self, record: RequestRecord) -> None:
        """Leave a record to be written. Never blocks."""
        if len(self._queue) >= QUEUE:
            self._count("dropped", 1)
            return
        self._queue.append(record)

    def purge(self, org: str | None, session: str | None = None) -> None:
        """Have the store forget an organisation or a session; see `Store.purge`. Never blocks."""
        if len(self.purges) >= MAX_PURGES:
            session = None
        self.purges[org, session] = None
        self._wake.set()

    def close(self) -> None:
        """Write what is left, for at most `LAST_S` seconds, and end the thread."""
        self._is_closed = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(LAST_S)

    def _run(self) -> None:
        pause_s = self._interval_s
        while not self._is_closed:
            self._wake.wait(pause_s)
            self._wake.clear()
            if self._work():
                pause_s = self._interval_s
            else:
                pause_s = min(_LONGEST_PAUSE_S, 2 * pause_s)
        self._work()

    def _work(self) -> bool:
        """Do what there is to do; return whether the database let us."""
        try:
            if self._store is None:
                self._store = self._open_store()
            purges = list(self.purges)
            is_taken = True
            while self._queue:
                is_taken &= self._write(self._store)
            self._write_evictions(self._store)
            for purge in purges:
                self._purge(self._store, purge)
            self._store.maintain(self._wall_clock(), MAINTAIN_S)
        except Exception as error:
            self._note_failure(error)
            return False
        if is_taken:
            self._note_success()
        return True

    def _purge(self, store: Store, purge: tuple[str | None, str | None]) -> None:
        # Taken out first: another one of the same may come while this one is carried out.
        del self.purges[purge]
        try:
            store.purge(*purge)
        except Exception:
            self.purges[purge] = None
            raise

    def _write(self, store: Store) -> bool:
        """Write records; return whether the database took them."""
        records = [self._queue[i] for i in range(min(BATCH, len(self._queue)))]
        try:
            store.write(Batch.of(records, self._limits))
            outcome = "written"
        except (OperationalError, InterfaceError):
            # The database is away, locked or full: they stay in the queue.
            raise
        except Exception as error:
            self._note_failure(error)
            outcome = "failed"
        for _ in records:
            self._queue.popleft()
        self._count(outcome, len(records))
        return outcome == "written"

    def _write_evictions(self, store: Store) -> None:
        counts = self.evictions.take()
        if not counts:
            return
        try:
            store.write_evictions(rows_of(counts, self._limits))
        except (OperationalError, InterfaceError):
            self.evictions.put_back(counts)
            raise

    def _note_failure(self, error: Exception) -> None:
        if not self._is_failing:
            logger.warning(
                "The ledger cannot be written, and requests go on without it: %s", describe(error)
            )
        self._is_failing = True

    def _note_success(self) -> None:
        if self._is_failing:
            logger.info("The ledger can be written again")
        self._is_failing = False
