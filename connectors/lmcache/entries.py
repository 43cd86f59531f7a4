"""The entries of a tier in a store behind an adapter: values, and records of when they expire."""

import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager

from cachetools import FIFOCache
from lmcache.v1.distributed.l2_adapters import L2AdapterConfigBase

from vllm_cachescope.connectors.lmcache.adapters import Entry, Kind, listed, name
from vllm_cachescope.connectors.lmcache.expiries import UNREADABLE, Expiries
from vllm_cachescope.connectors.lmcache.memory import Buffer, Staging
from vllm_cachescope.connectors.lmcache.records import batches, put
from vllm_cachescope.connectors.lmcache.session import Call, Session
from vllm_cachescope.tiers.leases import LEASE_BYTES, Leases, claimed_end
from vllm_cachescope.tiers.store import StoreFailed

DOUBTS = 3
"""How often an object fails to load behind another one that failed until it is itself to blame."""

DOUBTED = 10_000
"""How many entries may be in doubt at once; beyond that the first of them start afresh."""


class Entries:
    """The entries in a store, as far as this engine knows them. Safe to use from several threads.

    An entry is there if its value is, and a record that has time left. What this engine knows of
    records is in `expiries`; a record is read when an entry is not known to be alive.

    Args:
        config: the adapter's.
        staging: memory for the objects on their way.
        namespace: of this engine's entries.
        leases: grants and reads the leases of entries, which are their records.
        timeout_s: how long any one thing may take, in seconds.
        clock: the tier's clock.
        wall_clock: Unix time in seconds.
        session: returns the session there is, or raises `StoreFailed`.

    Attributes:
        expiries: when the entries expire.
    """

    def __init__(
        self,
        config: L2AdapterConfigBase,
        staging: Staging,
        namespace: str,
        leases: Leases,
        timeout_s: float,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        session: Callable[[], Session],
    ) -> None:
        self.expiries = Expiries()
        self._config = config
        self._staging = staging
        self._namespace = namespace
        self._leases = leases
        self._timeout_s = timeout_s
        self._clock = clock
        self._wall_clock = wall_clock
        self._session = session
        # How often an entry's object did not load behind another that did not. Under the lock.
        self._lock = threading.Lock()
        self._doubts: FIFOCache[Entry, int] = FIFOCache(DOUBTED)

    def now_ms(self) -> int:
        """Return Unix time in ms."""
        return int(self._wall_clock() * 1000)

    def wall_ms(self, at: float) -> int:
        """Return a time of the tier's clock in ms of Unix time."""
        return int((self._wall_clock() + at - self._clock()) * 1000)

    def entry(self, key: bytes) -> Entry:
        """Return this engine's entry with ``key``."""
        return Entry(self._namespace, key)

    def present(self, entries: Sequence[Entry], deadline: float) -> list[bool]:
        """Return which entries are there and have not expired. The upkeep drops by and by what is
        only half there, or has expired.

        Raises:
            StoreFailed: if it cannot be told.
        """
        session = self._session()
        present: list[bool] = []
        for batch in batches(entries):
            present += self._present(session, batch, deadline)
        return present

    def _present(
        self, session: Session, entries: Sequence[Entry], deadline: float
    ) -> Iterator[bool]:
        now_ms, expiries = self.now_ms(), self.expiries
        unknown = [e for e in entries if expiries.of(e) <= now_ms and not expiries.is_unreadable(e)]
        found = session.find(
            [
                *(name(entry, Kind.VALUE) for entry in entries),
                *(name(entry, Kind.EXPIRY) for entry in unknown),
            ],
            deadline,
        )
        valued, recorded = found[: len(entries)], found[len(entries) :]
        self._learn(session, [e for e, r in zip(unknown, recorded, strict=True) if r], deadline)
        return (
            has_value and expiries.of(entry) > now_ms
            for entry, has_value in zip(entries, valued, strict=True)
        )

    def record(self, expires_ms: Mapping[Entry, int], deadline: float) -> None:
        """Store records of when entries expire that have none.

        Args:
            expires_ms: the times, in ms of Unix time.
            deadline: until when that is waited for.

        Raises:
            StoreFailed: if that did not work.
        """
        records = {
            name(entry, Kind.EXPIRY): self._leases.grant(_lease_name(entry), at)
            for entry, at in expires_ms.items()
        }
        put(self._session(), self._staging, records, deadline)
        for entry, at in expires_ms.items():
            self.expiries.learn(entry, at)

    def read_records(
        self, session: Session, entries: Sequence[Entry], deadline: float
    ) -> list[Entry]:
        """Read when entries expire; return those of which there is no record.

        Args:
            session: the session there is.
            entries: at most as many as one thread has under way at once.
            deadline: until when that is waited for.

        Raises:
            StoreFailed: if it cannot be told.
        """
        found = session.find([name(entry, Kind.EXPIRY) for entry in entries], deadline)
        recorded = [entry for entry, there in zip(entries, found, strict=True) if there]
        self._learn(session, recorded, deadline)
        return [entry for entry, there in zip(entries, found, strict=True) if not there]

    def drop(self, entries: Sequence[Entry], deadline: float) -> int:
        """Delete entries; return how many there were.

        Raises:
            StoreFailed: if they are not gone.
        """
        session = self._session()
        dropped = 0
        for batch in batches(entries):
            soon = min(deadline, self._clock() + self._timeout_s)
            values = [name(entry, Kind.VALUE) for entry in batch]
            keys = [*values, *(name(entry, Kind.EXPIRY) for entry in batch)]
            found = session.find(keys, soon)
            there = [key for key, exists in zip(keys, found, strict=True) if exists]
            if there:
                session.drop(there, soon)
                if any(session.lookup(there, soon)):
                    raise StoreFailed("it has not deleted what it was told to")
            for entry in batch:
                self.expiries.drop(entry)
            dropped += sum(found[: len(batch)])
        return dropped

    def purge(self, prefix: bytes, deadline: float) -> int:
        """Delete all entries whose key begins with ``prefix``; return how many there were.

        Raises:
            StoreFailed: if it is not known that all are gone.
        """
        session = self._session()
        entries = set(self.expiries.beginning_with(prefix))

        def others() -> set[Entry]:
            return {entry for entry, _ in self.listed(session) if entry.key.startswith(prefix)}

        try:
            entries |= Call(others, self._clock).result(deadline)
        except StoreFailed as error:
            if not isinstance(error.__cause__, NotImplementedError):
                raise
            dropped = self.drop(list(entries), deadline)
            raise StoreFailed(
                f"the {dropped} entries that this engine knew are deleted. LMCache's adapter "
                "cannot list what else it holds: entries that only other engines know stay until "
                "they expire"
            ) from None
        return self.drop(list(entries), deadline)

    def listed(self, session: Session) -> Generator[tuple[Entry, bytes]]:
        """Yield the entries in the store; see `adapters.listed`."""
        return listed(self._config, session.adapter)

    def _learn(self, session: Session, entries: Sequence[Entry], deadline: float) -> None:
        """Read when entries expire whose records are there."""
        for batch in batches(entries):
            keys = [name(entry, Kind.EXPIRY) for entry in batch]
            buffers = self._staging.records.take(len(keys))
            with self.blaming(session) as is_to_blame, session.loading(keys, buffers) as tasks:
                for entry, task, buffer in zip(batch, tasks, buffers, strict=True):
                    if session.wait(task, deadline)[0]:
                        self.expiries.learn(entry, self._end(entry, buffer))
                        with self._lock:
                            self._doubts.pop(entry, None)
                    else:
                        is_to_blame(entry)

    def _end(self, entry: Entry, record: Buffer) -> int:
        """Return when an entry with this record expires, in ms of Unix time."""
        lease = bytes(record.view[:LEASE_BYTES])
        if entry.namespace != self._namespace:
            # Another secret may hold there. Such an entry is deleted here, and never served.
            return claimed_end(lease)
        ends_at_ms = self._leases.end(_lease_name(entry), lease)
        return UNREADABLE if ends_at_ms is None else ends_at_ms

    @contextmanager
    def blaming(self, session: Session) -> Iterator[Callable[[Entry], bool]]:
        """Find out which entries are to blame when objects that are there do not load.

        Load inside this context. Call the function that it gives with each entry of which an object
        was there and did not load, in the order in which the loads began: the function returns
        whether the entry itself is to blame. Such an entry counts as unreadable and is dropped;
        another load of it might harm the next adapter too.

        The first object that does not load is to blame. An object behind it may have failed for
        that alone, since a RESP adapter takes the rest of one answer for the next one; it is to
        blame once that has happened `DOUBTS` times. If any object did not load, the session is over
        at the end of the context.
        """

        def is_to_blame(entry: Entry) -> bool:
            with self._lock:
                doubts = self._doubts.pop(entry, 0) + 1
                to_blame = not session.spoiled or doubts >= DOUBTS
                session.spoiled = True
                if not to_blame:
                    self._doubts[entry] = doubts
            if to_blame:
                self.expiries.learn(entry, UNREADABLE)
            return to_blame

        try:
            yield is_to_blame
        finally:
            if session.spoiled:
                session.retire("an object did not load that was there")


def _lease_name(entry: Entry) -> bytes:
    # Namespaces are all of one length.
    return entry.namespace.encode() + entry.key
