"""The exchange of notes on sessions with other replicas, through a store that they share.

A thread of its own talks to the store. Nobody waits for it: what comes too late, or not at all,
costs the diagnosis of a session that has moved, and nothing else.
"""

import asyncio
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from random import random as any_random
from typing import TypeVar

from prometheus_client import REGISTRY, CollectorRegistry

from vllm_cachescope.diagnosis.session_note import (
    FORMAT,
    MAX_NOTE,
    NoteKey,
    SessionNote,
    pack,
    unpack,
)
from vllm_cachescope.logs import logger_of
from vllm_cachescope.metrics import NO_ENGINE, SESSION_NOTES
from vllm_cachescope.registration import counter
from vllm_cachescope.tenancy.shares import AccountOf, Shares, own_account
from vllm_cachescope.tiers.breaker import Breaker
from vllm_cachescope.tiers.joining import join
from vllm_cachescope.tiers.note_seals import NoteSeals
from vllm_cachescope.tiers.note_store import NoteName, NoteStore
from vllm_cachescope.tiers.store import StoreFailed

READ_S = 0.25
"""How long a diagnosis waits for notes, in seconds. It is made behind the reply."""

TIMEOUT_S = 1.0
"""How long the store may take for anything else, in seconds."""

PURGE_S = 30.0
"""How long deleting all notes may take, in seconds."""

SETTLE_S = 5.0
"""How long a purge waits until the notes are deleted, in seconds."""

TTL_S = 6 * 3600
"""How long notes are kept at least, in seconds: as long as the requests here, so that it can be
told of what has expired that it has."""

MAX_TTL_S = 7 * 24 * 3600
"""How long they are kept at most."""

MAX_READS = 1000
"""Questions that wait at once; of further ones nothing is known."""

MAX_WAITING = 16 * 2**20
"""Bytes of notes that wait to be written, about. Of the account with most the oldest go first."""

MAX_FORGOTTEN = 10_000
"""Purges that wait to be carried out in a store that does not answer."""

FAILURES, FIRST_PROBE_S, LONGEST_PROBE_S = 2, 0.5, 15.0
"""After so many failures in a row the store is left alone but for a try now and then."""

T = TypeVar("T")

logger = logger_of(__name__)


@dataclass(slots=True)
class _Read:
    key: NoteKey
    deadline: float
    done: Callable[[Sequence[SessionNote]], object]


@dataclass(slots=True)
class _Waiting:
    """Notes on a session that wait to be written."""

    notes: list[SessionNote] = field(default_factory=list)
    nbytes: int = 0


class SessionExchange:
    """Reads and writes the notes of one API process. All methods but `close` are called on the
    event loop.

    Args:
        new_store: makes the store for the thread; must not connect yet.
        secret: that of all servers which share the store.
        model_name: the model's name in the server's own metrics.
        replica: what the operator knows this server by.
        account_of: returns who answers for an organisation, by its id.
        registry: where the counter is registered.
        clock: seconds, never running backwards; that of the lineage store.
        random: a number in [0, 1).
    """

    def __init__(
        self,
        new_store: Callable[[], NoteStore],
        secret: bytes,
        model_name: str,
        replica: str,
        account_of: AccountOf = own_account,
        registry: CollectorRegistry = REGISTRY,
        clock: Callable[[], float] = time.monotonic,
        random: Callable[[], float] = any_random,
    ) -> None:
        self._store = new_store()
        # Notes of another format are others' altogether.
        self._seals = NoteSeals(secret, f"{FORMAT} {model_name}")
        self._replica = replica
        self._account_of = account_of
        self._clock = clock
        self._counter = counter(SESSION_NOTES, registry)
        self._model_name = model_name
        self._breaker = Breaker(FAILURES, FIRST_PROBE_S, LONGEST_PROBE_S, clock, random)
        self._work = threading.Condition()
        # Under the lock of `_work`.
        self._reads: deque[_Read] = deque()
        self._waiting: OrderedDict[NoteKey, _Waiting] = OrderedDict()
        self._shares = Shares()
        self._forgotten: OrderedDict[tuple[str | None, str | None], None] = OrderedDict()
        self._is_writing = False
        self._stopping = False
        # Of the event loop.
        self._purges = 0
        self._thread = threading.Thread(target=self._run, name="cachescope-sessions", daemon=True)
        self._thread.start()

    # On the event loop.

    async def recall(self, key: NoteKey, within_s: float = READ_S) -> Sequence[SessionNote]:
        """Return the notes that are known of a session; none after ``within_s`` seconds."""
        if self._breaker.probe_in() > 0:
            self._count("unavailable")
            return ()
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Sequence[SessionNote]] = loop.create_future()

        def settle(notes: Sequence[SessionNote]) -> None:
            if not answer.done():
                answer.set_result(notes)

        def done(notes: Sequence[SessionNote]) -> None:
            # The loop may be closed: the server is going down.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(settle, notes)

        purges = self._purges
        with self._work:
            if len(self._reads) >= MAX_READS:
                self._count("dropped")
                return ()
            self._reads.append(_Read(key, self._clock() + within_s, done))
            self._work.notify()
        try:
            notes = await asyncio.wait_for(answer, within_s)
        except TimeoutError:
            self._count("late")
            return ()
        # What was purged meanwhile is not to come back.
        return notes if purges == self._purges else ()

    def put(self, key: NoteKey, note: SessionNote) -> None:
        """Have a note written, soon."""
        with self._work:
            self._add(key, note)
            while self._shares.total > MAX_WAITING:
                self._drop_oldest(self._shares.largest())
            self._work.notify()

    def forget(self, org: str | None, session: str | None) -> None:
        """Have the notes of an organisation deleted, or of one session of it; with None, all."""
        self._purges += 1
        with self._work:
            for key in list(self._waiting):
                if org in (None, key.org) and session in (None, key.session):
                    self._take(key)
            self._forgotten[org, session] = None
            while len(self._forgotten) > MAX_FORGOTTEN:
                # Of one of its sessions an organisation may be purged as a whole.
                (lost, _), _ = self._forgotten.popitem(last=False)
                self._forgotten[lost, None] = None
            self._work.notify()

    async def settled(self) -> str | None:
        """Wait until what is to be forgotten is deleted; return why it is not after `SETTLE_S`."""
        until = self._clock() + SETTLE_S
        while self._forgotten or self._is_writing:
            if self._clock() > until or self._breaker.probe_in() > 0:
                return self._breaker.reason or "it does not answer in time"
            await asyncio.sleep(0.005)
        return None

    def close(self) -> None:
        """End the thread; what waits is lost."""
        with self._work:
            self._stopping = True
            self._work.notify()
        join([self._thread], self._clock() + TIMEOUT_S, self._clock)

    def _count(self, outcome: str) -> None:
        self._counter.labels(self._model_name, NO_ENGINE, outcome).inc()

    # Under the lock.

    def _add(self, key: NoteKey, note: SessionNote) -> None:
        waiting, nbytes = self._waiting.setdefault(key, _Waiting()), note.nbytes
        waiting.notes.append(note)
        waiting.nbytes += nbytes
        self._shares.add(self._account_of(key.org), nbytes)

    def _drop_oldest(self, account: str) -> None:
        key = next(key for key in self._waiting if self._account_of(key.org) == account)
        for _ in self._take(key):
            self._count("dropped")

    def _take(self, key: NoteKey) -> list[SessionNote]:
        waiting = self._waiting.pop(key)
        self._shares.add(self._account_of(key.org), -waiting.nbytes)
        return waiting.notes

    # The thread.

    def _run(self) -> None:
        while True:
            with self._work:
                while not self._stopping and not self._is_due():
                    self._work.wait(self._pause_s())
                if self._stopping:
                    break
                reads = list(self._reads)
                self._reads.clear()
            for read in reads:
                self._answer(read)
            self._forget_some()
            # A question comes in front of what is to be written.
            while not self._reads and self._write_one():
                pass
        self._store.close()

    def _is_due(self) -> bool:
        if self._reads:
            return True
        return bool(self._forgotten or self._waiting) and self._breaker.probe_in() <= 0

    def _pause_s(self) -> float | None:
        if self._forgotten or self._waiting:
            return max(0.001, self._breaker.probe_in())
        return None

    def _answer(self, read: _Read) -> None:
        notes: Sequence[SessionNote] = ()
        try:
            if self._clock() < read.deadline and self._breaker.probe_in() <= 0:
                notes = self._read(read.key, read.deadline)
        except Exception:
            logger.exception("Notes on a session cannot be read")
        finally:
            read.done(notes)

    def _read(self, key: NoteKey, deadline: float) -> Sequence[SessionNote]:
        with self._work:
            purges = list(self._forgotten)
        if any(org in (None, key.org) and s in (None, key.session) for org, s in purges):
            return ()
        place = self._name(key)

        def read() -> tuple[float, Mapping[bytes, bytes]]:
            return self._store.ahead_s(deadline), self._store.read(place, deadline)

        if (found := self._asked(deadline, read)) is None:
            return ()
        ahead_s, sealed = found
        notes = []
        for name, text in sealed.items():
            plain = self._seals.open(key.org, place.session + name, text)
            note = None if plain is None else unpack(plain, self._replica, ahead_s)
            if note is None or note.node.name != name:
                self._count("damaged")
            else:
                notes.append(note)
        self._count("found" if notes else "none")
        return notes

    def _write_one(self) -> bool:
        """Write the notes on the session that waits longest; return whether there are more."""
        if self._breaker.probe_in() > 0:
            return False
        with self._work:
            if self._stopping or not self._waiting:
                return False
            key, waiting = next(iter(self._waiting.items()))
            notes = list(waiting.notes)
            self._is_writing = True
        is_over = True
        try:
            is_over = self._write(key, notes)
        except Exception:
            logger.exception("Notes on a session cannot be written")
        finally:
            with self._work:
                self._is_writing = False
                # Unless it was purged, or pushed out.
                if is_over and self._waiting.get(key) is waiting:
                    self._take(key)
                    for note in waiting.notes[len(notes) :]:
                        self._add(key, note)
                elif key in self._waiting:
                    # It may be this session alone that the store does not take.
                    self._waiting.move_to_end(key)
        return is_over

    def _write(self, key: NoteKey, notes: list[SessionNote]) -> bool:
        """Write notes on a session; return False if the store does not take them now."""
        deadline = self._clock() + TIMEOUT_S
        place = self._name(key)
        ttl_s = min(MAX_TTL_S, max(TTL_S, *(note.ttl_s for note in notes)))

        def write() -> int:
            ahead_s = self._store.ahead_s(deadline)
            sealed = {}
            for note in notes:
                plain = pack(note, self._replica, ahead_s)
                if len(plain) <= MAX_NOTE:
                    name = note.node.name
                    sealed[name] = self._seals.seal(key.org, place.session + name, plain)
            obsolete = [note.obsolete for note in notes if note.obsolete]
            if sealed:
                self._store.write(place, sealed, obsolete, ttl_s, deadline)
            return len(sealed)

        if (written := self._asked(deadline, write)) is None:
            return False
        for i in range(len(notes)):
            self._count("written" if i < written else "dropped")
        return True

    def _forget_some(self) -> None:
        while self._breaker.probe_in() <= 0:
            with self._work:
                if self._stopping or not self._forgotten:
                    return
                org, session = purge = next(iter(self._forgotten))
            done = self._asked(self._clock() + PURGE_S, partial(self._drop, org, session))
            with self._work:
                if done:
                    self._forgotten.pop(purge, None)
                elif purge in self._forgotten:
                    self._forgotten.move_to_end(purge)
            if not done:
                return

    def _drop(self, org: str | None, session: str | None) -> bool:
        if org is None:
            self._store.drop_all(self._clock() + PURGE_S)
        else:
            name = self._seals.name(self._account_of(org), org, _session(session))
            self._store.drop(name, self._clock() + TIMEOUT_S)
        return True

    def _asked(self, deadline: float, ask: Callable[[], T]) -> T | None:
        """Return what the store answers; None if it does not."""
        try:
            if not self._store.alive():
                self._store.connect(min(deadline, self._clock() + TIMEOUT_S))
            answer = ask()
        except Exception as error:
            if not isinstance(error, StoreFailed):
                logger.exception("Notes on sessions cannot be exchanged")
                self._store.close()
            if self._breaker.failed(str(error)):
                logger.warning(
                    "What other replicas know of sessions is not asked for at %s for a while: %s",
                    self._store.address,
                    error,
                )
            return None
        if self._breaker.succeeded():
            logger.info("What other replicas know of sessions is asked for again")
        return answer

    def _name(self, key: NoteKey) -> NoteName:
        session = b"opening " + key.opening if key.session is None else _session(key.session)
        return self._seals.name(self._account_of(key.org), key.org, session)


def _session(session: str | None) -> bytes:
    return b"" if session is None else b"named " + session.encode(errors="surrogatepass")
