"""What the threads of a tier share: the adapter, what is known of its entries, and their upkeep."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

from lmcache.v1.distributed.api import ObjectKey
from lmcache.v1.distributed.l2_adapters import L2AdapterConfigBase, L2AdapterInterface

from vllm_cachescope.connectors.lmcache.adapters import (
    Entry,
    Kind,
    create_l2_adapter,
    listed,
    name,
)
from vllm_cachescope.connectors.lmcache.expiries import UNREADABLE, Expiries
from vllm_cachescope.connectors.lmcache.memory import AT_ONCE, Buffer, Staging
from vllm_cachescope.connectors.lmcache.session import Call, Session
from vllm_cachescope.logs import logger_of
from vllm_cachescope.tiers import envelope
from vllm_cachescope.tiers.envelope import HEADER_BYTES
from vllm_cachescope.tiers.store import ForeignSecret, StoreFailed, StoreLate, StoreUnfit

T = TypeVar("T")

logger = logger_of(__name__)

MARK_S = 60.0
"""How long the mark of a secret outlives the last engine that has it, in seconds."""

UPKEEP_S = 1.0
"""How often expired entries are looked for, in seconds."""

FIRST_LIST_S = 60.0
"""When an engine first looks for what others have left, in seconds after its start."""

LIST_S = 600.0
"""Time from the end of one such search to the next, in seconds."""

CLOSE_S = 1.0
"""How long closing may take beyond the timeout, in seconds: the native adapters take half of it."""

DOUBTS = 3
"""So often an object must not load behind another that did not before that is its own fault."""

DOUBTED = 10_000
"""How many entries are in doubt at most; beyond that all of them get a fresh start."""

STUCK = 4
"""After so many timeouts a task of the adapter's is not expected to end any more."""


class Backend:
    """An adapter, made anew whenever it fails. Safe to use from several threads.

    Args:
        config: the adapter's.
        staging: memory for the objects on their way.
        timeout_s: how long any one thing may take, in seconds.
        namespace: of this engine's entries.
        mark: tells our secret from others.
        clock: the tier's clock.
        wall_clock: Unix time in seconds.
    """

    def __init__(
        self,
        config: L2AdapterConfigBase,
        staging: Staging,
        timeout_s: float,
        namespace: str,
        mark: bytes,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
    ) -> None:
        self.staging = staging
        self.expiries = Expiries()
        self.namespace = namespace
        self._config = config
        self._timeout_s = timeout_s
        self._mark = mark
        self.clock = clock
        self._wall_clock = wall_clock
        self._canary = name(Entry(namespace, b""), Kind.CANARY)
        self._connecting = threading.Lock()
        self._making: Call[L2AdapterInterface] | None = None
        self._session: Session | None = None
        # Of the threads that use it, and of the upkeep.
        self._lock = threading.Condition()
        self._users: set[object] = set()
        self._upkeep: tuple[threading.Thread, threading.Event] | None = None
        self._uses: dict[Entry, int] = {}
        self._doubts: dict[Entry, int] = {}
        self._reclaimed = 0
        self._listing: Iterator[tuple[Entry, bytes]] | None = None
        self._list_at = clock() + FIRST_LIST_S
        self._unrecorded: set[Entry] = set()
        self._unrecorded_now: set[Entry] = set()

    def now_ms(self) -> int:
        """Return Unix time in ms."""
        return int(self._wall_clock() * 1000)

    def wall_ms(self, at: float) -> int:
        """Return a time of the tier's clock in ms of Unix time."""
        return int((self._wall_clock() + at - self.clock()) * 1000)

    # Sessions.

    def alive(self) -> bool:
        """Whether there is an adapter that has not failed."""
        return self._session is not None and self._session.alive

    def session(self) -> Session:
        """Return the session there is.

        Raises:
            StoreFailed: if there is none.
        """
        session = self._session
        if session is None or not session.alive:
            raise StoreFailed("there is no adapter")
        return session

    def connect(self, user: object, deadline: float) -> Session:
        """Have an adapter that works, for one of the threads that share it.

        Raises:
            StoreFailed: if there is none to be had.
            StoreUnfit: if the tier must not run on it.
        """
        with self._lock:
            self._users.add(user)
        if not self._connecting.acquire(timeout=max(0.0, deadline - self.clock())):
            raise StoreLate("the adapter is still being made")
        try:
            if not self.alive():
                self._session = self._new_session(deadline)
        finally:
            self._connecting.release()
        with self._lock:
            if self._upkeep is None and self._users:
                stop = threading.Event()
                upkeep = threading.Thread(
                    target=self._keep_up,
                    args=(stop,),
                    name="cachescope-lmcache-upkeep",
                    daemon=True,
                )
                self._upkeep = upkeep, stop
                upkeep.start()
        return self.session()

    def leave(self, user: object) -> None:
        """A thread does not use the adapter any more; the last one closes it."""
        with self._lock:
            self._users.discard(user)
            if self._users:
                return
            upkeep, self._upkeep = self._upkeep, None
        if upkeep is not None:
            thread, stop = upkeep
            stop.set()
            with self._lock:
                self._lock.notify_all()
            thread.join(self._timeout_s)
        with self._connecting:
            if self._users:
                return
            patience = self._soon() + CLOSE_S
            try:
                if self._making is not None:
                    self._making.result(patience).close()
                    self._making = None
                if self._session is not None:
                    self._session.retire("the engine goes down").result(patience)
                    self._session = None
            except StoreFailed as error:
                logger.warning("LMCache's adapter does not close: %s", error)

    def _new_session(self, deadline: float) -> Session:
        if self._session is not None:
            # Two of some adapters would be one too many: they own their device.
            try:
                self._session.retire("").result(deadline)
            except StoreLate:
                raise
            except StoreFailed as error:
                logger.warning("LMCache's adapter did not close well: %s", error)
            self._session = None
        if self._making is None:
            self._making = Call(
                lambda: create_l2_adapter(self._config, self.staging.desc), self.clock
            )
        try:
            adapter = self._making.result(deadline)
        except StoreLate:
            raise
        except StoreFailed:
            self._making = None
            raise
        self._making = None
        session = Session(adapter, self.staging, STUCK * self._timeout_s, self.clock)
        try:
            self.shake_hands(session, deadline)
        except Exception as error:
            session.retire(str(error))
            self._session = session
            raise
        return session

    def shake_hands(self, session: Session, deadline: float) -> None:
        """Make sure that the adapter keeps and deletes what it is told to, and that no engine
        with another secret is there.

        Raises:
            StoreFailed: if it does not answer.
            StoreUnfit: if the tier must not run on it.
        """
        place = Entry(self.namespace, b"")
        mark = name(place, Kind.MARK)
        there, marked = session.lookup([self._canary, mark], deadline)
        if not there:
            self._put(session, {self._canary: b""}, deadline)
            if not session.lookup([self._canary], deadline)[0]:
                raise StoreFailed("it does not hold what was stored in it")
        now_ms = self.now_ms()
        until_ms = 0
        if marked:
            until_ms, secret = self._read_mark(session, mark, deadline)
            if until_ms > now_ms and secret != self._mark:
                raise ForeignSecret(
                    "another engine that serves this model uses it with another secret. Give all "
                    "replicas the same secret; after a change of the secret this tier starts by "
                    f"itself, {MARK_S:.0f} s after the last engine with the old one has gone"
                )
        if until_ms < now_ms + MARK_S * 1000 * 2 / 3:
            session.delete([mark], deadline)
            if session.lookup([mark], deadline)[0]:
                raise StoreUnfit("it does not delete: nothing in it would ever expire")
            content = _packed(Kind.MARK, self._mark, now_ms + int(MARK_S * 1000))
            self._put(session, {mark: content}, deadline)

    def _read_mark(self, session: Session, mark: ObjectKey, deadline: float) -> tuple[int, bytes]:
        buffers = self.staging.records.take(1)
        with session.loading([mark], buffers) as tasks:
            if session.wait(tasks[0], deadline)[0]:
                return _unpacked(Kind.MARK, buffers[0], len(self._mark))
        raise StoreFailed("the mark of a secret does not load")

    def usage(self) -> dict[str, int]:
        """Return what the adapter says of its memory, in bytes."""
        usage = self.session().adapter.get_usage()
        return {
            "used_bytes": usage.total_bytes_used,
            "capacity_bytes": usage.total_capacity_bytes,
        }

    # Entries.

    def entry(self, key: bytes) -> Entry:
        """Return this engine's entry with ``key``."""
        return Entry(self.namespace, key)

    def present(self, entries: Sequence[Entry], deadline: float) -> list[bool]:
        """Return which entries are there and have not expired. What is only half there, or has
        expired, is reclaimed by and by.

        Raises:
            StoreFailed: if it cannot be told.
        """
        session = self.session()
        present: list[bool] = []
        for batch in _batches(entries):
            present += self._present(session, batch, deadline)
        return present

    def _present(self, session: Session, entries: list[Entry], deadline: float) -> list[bool]:
        now_ms = self.now_ms()
        unknown = [e for e in entries if self.expiries.of(e) <= now_ms and not self._unreadable(e)]
        found = session.lookup(
            [
                self._canary,
                *(name(entry, Kind.VALUE) for entry in entries),
                *(name(entry, Kind.EXPIRY) for entry in unknown),
            ],
            deadline,
        )
        self._heed_canary(session, found[0])
        valued = {e for e, there in zip(entries, found[1:], strict=False) if there}
        recorded = [e for e, there in zip(unknown, found[1 + len(entries) :], strict=True) if there]
        self._learn(session, recorded, deadline)
        return [entry in valued and self.expiries.of(entry) > now_ms for entry in entries]

    def make_sure_it_lives(self, session: Session, deadline: float) -> None:
        """Tell a "no" from a failure.

        Raises:
            StoreFailed: if the adapter has failed.
        """
        self._heed_canary(session, session.lookup([self._canary], deadline)[0])

    def _heed_canary(self, session: Session, sings: bool) -> None:
        if not sings:
            reason = "it does not find what it held: it has gone, or was emptied"
            session.retire(reason)
            raise StoreFailed(reason)

    def record(self, expires_ms: Mapping[Entry, int], deadline: float) -> None:
        """Write down when entries expire of which there is no record.

        Raises:
            StoreFailed: if that did not work.
        """
        records = {name(e, Kind.EXPIRY): _packed(e.key, b"", at) for e, at in expires_ms.items()}
        self._put(self.session(), records, deadline)
        for entry, at in expires_ms.items():
            self.expiries.learn(entry, at)

    def used(self, until_ms: Mapping[Entry, int]) -> None:
        """Entries were used; the upkeep writes it down."""
        with self._lock:
            for entry, until in until_ms.items():
                if self._worth(self.expiries.of(entry), until):
                    self._uses[entry] = max(until, self._uses.get(entry, 0))
            self._lock.notify_all()

    def _worth(self, known_ms: int, until_ms: int) -> bool:
        """Whether a record should be written anew: not for each use of an entry in constant use.
        It expires early by a sixteenth of its lifetime at most for that."""
        return until_ms - known_ms >= (until_ms - self.now_ms()) / 16

    def erase(self, entries: Sequence[Entry], deadline: float) -> int:
        """Delete entries; return how many there were.

        Raises:
            StoreFailed: if they are not gone.
        """
        session = self.session()
        erased = 0
        for batch in _batches(entries):
            soon = min(deadline, self._soon())
            values = [name(entry, Kind.VALUE) for entry in batch]
            records = [name(entry, Kind.EXPIRY) for entry in batch]
            keys = [*values, *records]
            canary, *found = session.lookup([self._canary, *keys], soon)
            self._heed_canary(session, canary)
            there = [key for key, exists in zip(keys, found, strict=True) if exists]
            if there:
                session.delete(there, soon)
                if any(session.lookup(there, soon)):
                    raise StoreFailed("it has not deleted what it was told to")
            for entry in batch:
                self.expiries.forget(entry)
            erased += sum(found[: len(batch)])
        return erased

    def purge(self, prefix: bytes, deadline: float) -> int:
        """Delete all entries whose key begins with ``prefix``; return how many there were.

        Raises:
            StoreFailed: if it is not known that all are gone.
        """
        session = self.session()
        entries = set(self.expiries.beginning_with(prefix))

        def others() -> set[Entry]:
            everything = listed(self._config, session.adapter)
            return {entry for entry, _ in everything if entry.key.startswith(prefix)}

        try:
            entries |= Call(others, self.clock).result(deadline)
        except StoreFailed as error:
            if not isinstance(error.__cause__, NotImplementedError):
                raise
            erased = self.erase(list(entries), deadline)
            raise StoreFailed(
                f"the {erased} entries that this engine knew are deleted. LMCache's adapter cannot "
                "list what else it holds: entries that only other engines know stay until they "
                "expire"
            ) from None
        return self.erase(list(entries), deadline)

    def take_reclaimed(self) -> int:
        """Return how many expired entries were deleted since the last time."""
        with self._lock:
            reclaimed, self._reclaimed = self._reclaimed, 0
        return reclaimed

    # Small objects.

    def _unreadable(self, entry: Entry) -> bool:
        return entry in self.expiries and self.expiries.of(entry) == UNREADABLE

    def _learn(self, session: Session, entries: Sequence[Entry], deadline: float) -> None:
        """Read when entries expire whose records are there."""
        for batch in _batches(entries):
            keys = [name(entry, Kind.EXPIRY) for entry in batch]
            buffers = self.staging.records.take(len(keys))
            with self.suspicious(session) as unloadable, session.loading(keys, buffers) as tasks:
                for entry, task, buffer in zip(batch, tasks, buffers, strict=True):
                    if session.wait(task, deadline)[0]:
                        self.expiries.learn(entry, _unpacked(entry.key, buffer, 0)[0])
                        self._doubts.pop(entry, None)
                    else:
                        unloadable(entry)

    @contextmanager
    def suspicious(self, session: Session) -> Iterator[Callable[[Entry], bool]]:
        """Load something in this context. What it gives is to be called, in the order in which the
        loads began, with each entry of which an object was there and did not load; it returns
        whether that is the entry's own fault.

        Such an entry goes: asked for again, it might do again what it has done to the adapter, with
        which nothing is begun any more. What did not load behind it may have done so for it alone:
        a RESP adapter takes the rest of one answer for the next."""

        def unloadable(entry: Entry) -> bool:
            with self._lock:
                doubts = self._doubts.pop(entry, 0) + 1
                guilty = not session.spoiled or doubts >= DOUBTS
                session.spoiled = True
                if not guilty:
                    if len(self._doubts) >= DOUBTED:
                        self._doubts.clear()
                    self._doubts[entry] = doubts
            if guilty:
                self.expiries.learn(entry, UNREADABLE)
            return guilty

        try:
            yield unloadable
        finally:
            if session.spoiled:
                session.retire("an object did not load that was there")

    def _put(self, session: Session, contents: Mapping[ObjectKey, bytes], deadline: float) -> None:
        """Store small objects."""
        for batch in _batches(list(contents)):
            buffers = self.staging.records.take(len(batch))
            for key, buffer in zip(batch, buffers, strict=True):
                buffer.view[: len(contents[key])] = contents[key]
            with session.storing(batch, buffers) as tasks:
                stored = [session.wait(task, deadline)[0] for task in tasks]
            if not all(stored):
                self.make_sure_it_lives(session, deadline)
                raise StoreFailed("it stores nothing; LMCache's log says why")

    # The thread that keeps the store tidy.

    def _keep_up(self, stop: threading.Event) -> None:
        ending = False
        while not ending:
            with self._lock:
                self._lock.wait_for(lambda: stop.is_set() or self._uses, UPKEEP_S)
                ending = stop.is_set()
                uses, self._uses = self._uses, {}
            if not self.alive():
                self.used(uses)
                stop.wait(UPKEEP_S)
                continue
            try:
                self._write_down(uses)
                if not ending:
                    self._reclaim()
                    self._look_around()
            except StoreFailed as error:
                logger.info("What has expired is not reclaimed for now: %s", error)
                self.used(uses)
                stop.wait(UPKEEP_S)
            except Exception:
                logger.exception("What has expired is not reclaimed for now")
                stop.wait(UPKEEP_S)
        if self._listing is not None:
            self._listing.close()
            self._listing = None

    def _soon(self) -> float:
        return self.clock() + self._timeout_s

    def _write_down(self, uses: Mapping[Entry, int]) -> None:
        session = self.session() if uses else None
        for entries in _batches(list(uses)):
            assert session is not None
            self._look_up(session, [entry for entry in entries if not self._unreadable(entry)])
            now_ms = self.now_ms()
            later = {
                entry: uses[entry]
                for entry in entries
                if self.expiries.of(entry) > now_ms
                and self._worth(self.expiries.of(entry), uses[entry])
            }
            # Some adapters do not store what they hold already.
            session.delete([name(entry, Kind.EXPIRY) for entry in later], self._soon())
            self.record(later, self._soon())

    def _look_up(self, session: Session, entries: Sequence[Entry]) -> list[Entry]:
        """Read when entries expire; return those of which there is no record."""
        keys = [self._canary, *(name(entry, Kind.EXPIRY) for entry in entries)]
        found = session.lookup(keys, self._soon())
        self._heed_canary(session, found[0])
        recorded = [e for e, there in zip(entries, found[1:], strict=True) if there]
        self._learn(session, recorded, self._soon())
        return [e for e, there in zip(entries, found[1:], strict=True) if not there]

    def _reclaim(self) -> None:
        while expired := self.expiries.take_expired(self.now_ms(), AT_ONCE):
            try:
                # Another engine may have let them live on.
                self._look_up(self.session(), [e for e, at in expired if at != UNREADABLE])
                now_ms = self.now_ms()
                over = [entry for entry, _ in expired if self.expiries.of(entry) <= now_ms]
                erased = self.erase(over, self._soon())
            except StoreFailed:
                for entry, at in expired:
                    if entry not in self.expiries:
                        self.expiries.learn(entry, at)
                raise
            with self._lock:
                self._reclaimed += erased

    def _look_around(self) -> None:
        """Find what other engines left, a little at a time."""
        if self._listing is None:
            if self.clock() < self._list_at:
                return
            self._listing = listed(self._config, self.session().adapter)
        try:
            found = list(islice(self._listing, AT_ONCE))
        except NotImplementedError:
            self._list_at = float("inf")
            self._listing = None
            return
        except Exception as error:
            self._listing = None
            raise StoreFailed(f"it cannot be listed: {error}") from error
        unknown = sorted({entry for entry, _ in found if entry not in self.expiries})
        unrecorded = self._look_up(self.session(), unknown)
        # A value that never gets its record. The first time it may be about to.
        self.erase([e for e in unrecorded if e in self._unrecorded], self._soon())
        self._unrecorded_now.update(unrecorded)
        if len(found) < AT_ONCE:
            self._unrecorded, self._unrecorded_now = self._unrecorded_now, set()
            self._listing = None
            self._list_at = self.clock() + LIST_S


def _batches(things: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(things), AT_ONCE):
        yield things[start : start + AT_ONCE]


def _packed(key: bytes, content: bytes, expires_ms: int) -> bytes:
    """Return a small object: a header, and what it holds."""
    lifetime = envelope.Lifetime(0, expires_ms)
    return envelope.header(key, memoryview(content), lifetime) + content


def _unpacked(key: bytes, found: Buffer, length: int) -> tuple[int, bytes]:
    """Return when a small object expires, in ms of Unix time, and what it holds; `UNREADABLE` if
    it is damaged."""
    content = bytes(found.view[HEADER_BYTES : HEADER_BYTES + length])
    try:
        lifetime = envelope.check(key, bytes(found.view[:HEADER_BYTES]), memoryview(content))
    except envelope.BadEnvelope:
        return UNREADABLE, b""
    return lifetime.expires_at_ms, content
