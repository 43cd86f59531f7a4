"""The thread that keeps a store tidy: it records uses, and drops what has expired."""

import threading
from collections.abc import Callable, Generator, Mapping
from itertools import islice

from vllm_cachescope.connectors.lmcache.adapters import Entry, Kind, name
from vllm_cachescope.connectors.lmcache.entries import Entries
from vllm_cachescope.connectors.lmcache.expiries import UNREADABLE
from vllm_cachescope.connectors.lmcache.memory import AT_ONCE
from vllm_cachescope.connectors.lmcache.records import batches
from vllm_cachescope.connectors.lmcache.session import Session
from vllm_cachescope.logs import logger_of
from vllm_cachescope.tiers.store import StoreFailed

logger = logger_of(__name__)

UPKEEP_S = 1.0
"""How often expired entries are looked for, in seconds."""

FIRST_LIST_S = 60.0
"""When an engine first looks for what others have left, in seconds after its start."""

LIST_S = 600.0
"""Time from the end of one such search to the next, in seconds."""


class Upkeep:
    """Records when entries that were used expire, and drops those that have expired.

    `touch` and `take_expired` may be called on any thread; all else here happens on the upkeep's
    own. The adapters drop nothing by themselves, so what engines left that are gone is dropped by
    one that lists the store.

    Args:
        entries: the entries in the store.
        timeout_s: how long any one thing may take, in seconds.
        clock: the tier's clock.
        session: returns the session there is, or raises `StoreFailed`.
    """

    def __init__(
        self,
        entries: Entries,
        timeout_s: float,
        clock: Callable[[], float],
        session: Callable[[], Session],
    ) -> None:
        self._entries = entries
        self._timeout_s = timeout_s
        self._clock = clock
        self._session = session
        # Under the lock.
        self._lock = threading.Condition()
        self._thread: tuple[threading.Thread, threading.Event] | None = None
        self._touched: dict[Entry, int] = {}
        self._expired = 0
        # The thread's own.
        self._listing: Generator[tuple[Entry, bytes]] | None = None
        self._list_at = clock() + FIRST_LIST_S
        # Entries without a record that the last search came across, and those of this one.
        self._unrecorded: set[Entry] = set()
        self._unrecorded_now: set[Entry] = set()

    def start(self) -> None:
        """Start the thread, if there is none."""
        with self._lock:
            if self._thread is not None:
                return
            stop = threading.Event()
            thread = threading.Thread(
                target=self._run, args=(stop,), name="cachescope-lmcache-upkeep", daemon=True
            )
            self._thread = thread, stop
            thread.start()

    def stop(self) -> threading.Thread | None:
        """Have the thread end once it has recorded the last uses; return it, if there is one."""
        with self._lock:
            if self._thread is None:
                return None
            (thread, stop), self._thread = self._thread, None
            stop.set()
            self._lock.notify_all()
        return thread

    def touch(self, until_ms: Mapping[Entry, int]) -> None:
        """Let each entry live until its time at least, in ms of Unix time. The thread records it.

        An entry in constant use is not recorded anew for each: it expires early by a sixteenth of
        its lifetime at most for that.
        """
        with self._lock:
            for entry, until in until_ms.items():
                if self._is_worth_recording(entry, until):
                    self._touched[entry] = max(until, self._touched.get(entry, 0))
            self._lock.notify_all()

    def take_expired(self) -> int:
        """Return how many expired entries were dropped since the last time."""
        with self._lock:
            expired, self._expired = self._expired, 0
        return expired

    def _is_worth_recording(self, entry: Entry, until_ms: int) -> bool:
        left_ms = until_ms - self._entries.now_ms()
        return until_ms - self._entries.expiries.of(entry) >= left_ms / 16

    # The thread.

    def _run(self, stop: threading.Event) -> None:
        ending = False
        while not ending:
            with self._lock:
                self._lock.wait_for(lambda: stop.is_set() or self._touched, UPKEEP_S)
                ending = stop.is_set()
                touched, self._touched = self._touched, {}
            try:
                session = self._session()
            except StoreFailed:
                self.touch(touched)
                stop.wait(UPKEEP_S)
                continue
            try:
                self._record(session, touched)
                if not ending:
                    self._drop_expired(session)
                    self._search(session)
            except StoreFailed as error:
                logger.info("What has expired is not dropped for now: %s", error)
                self.touch(touched)
                stop.wait(UPKEEP_S)
            except Exception:
                logger.exception("What has expired is not dropped for now")
                stop.wait(UPKEEP_S)
        if self._listing is not None:
            self._listing.close()
            self._listing = None

    def _soon(self) -> float:
        return self._clock() + self._timeout_s

    def _record(self, session: Session, touched: Mapping[Entry, int]) -> None:
        expiries = self._entries.expiries
        for batch in batches(list(touched)):
            readable = [entry for entry in batch if not expiries.is_unreadable(entry)]
            self._entries.read_records(session, readable, self._soon())
            now_ms = self._entries.now_ms()
            later = {
                entry: touched[entry]
                for entry in batch
                if expiries.of(entry) > now_ms and self._is_worth_recording(entry, touched[entry])
            }
            # Some adapters do not store what they hold already.
            session.drop([name(entry, Kind.EXPIRY) for entry in later], self._soon())
            self._entries.record(later, self._soon())

    def _drop_expired(self, session: Session) -> None:
        expiries = self._entries.expiries
        while expired := expiries.pop_expired(self._entries.now_ms(), AT_ONCE):
            try:
                # Another engine may have let them live on.
                readable = [entry for entry, at in expired if at != UNREADABLE]
                self._entries.read_records(session, readable, self._soon())
                now_ms = self._entries.now_ms()
                over = [entry for entry, _ in expired if expiries.of(entry) <= now_ms]
                dropped = self._entries.drop(over, self._soon())
            except StoreFailed:
                for entry, at in expired:
                    if entry not in expiries:
                        expiries.learn(entry, at)
                raise
            with self._lock:
                self._expired += dropped

    def _search(self, session: Session) -> None:
        """Look for what other engines left, a little at a time."""
        if self._listing is None:
            if self._clock() < self._list_at:
                return
            self._listing = self._entries.listed(session)
        try:
            found = list(islice(self._listing, AT_ONCE))
        except NotImplementedError:
            self._list_at = float("inf")
            self._listing = None
            return
        except Exception as error:
            self._listing = None
            raise StoreFailed(f"it cannot be listed: {error}") from error
        unknown = sorted({entry for entry, _ in found if entry not in self._entries.expiries})
        unrecorded = self._entries.read_records(session, unknown, self._soon())
        # A value that was without a record the last time as well never gets one. The first time it
        # may be about to.
        abandoned = [entry for entry in unrecorded if entry in self._unrecorded]
        self._entries.drop(abandoned, self._soon())
        self._unrecorded_now.update(unrecorded)
        if len(found) < AT_ONCE:
            self._unrecorded, self._unrecorded_now = self._unrecorded_now, set()
            self._listing = None
            self._list_at = self._clock() + LIST_S
