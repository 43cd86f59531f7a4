"""A tier behind a network: who waits for it, for how long, and what is dropped.

The engine's scheduler calls a `RemoteTier` and is never kept waiting: threads of the tier's own
talk to the store. Three rules keep a broken store from being more than a cache miss:

- Who may write to a slot reports on it. A slot is reported failed by the very thread that was
  filling it, once it has stopped, or without any thread having begun; so nothing is written to a
  slot whose failure was reported.
- Every wait has a deadline. A request waits for `Limits.load_deadline_s` in all, from its first
  question to its last block, and keeps what has arrived by then. Only while blocks keep coming it
  waits longer: up to `Limits.load_share` of the time in which it could have computed them.
- Every queue is bounded in bytes. What does not fit is dropped and counted.
"""

import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from queue import Empty, SimpleQueue
from typing import Any

from vllm_cachescope.cache.miss_causes import MissCause
from vllm_cachescope.logs import logger_of
from vllm_cachescope.tiers import envelope
from vllm_cachescope.tiers.block_states import ABSENCES, Absence, BlockState, BlockStates
from vllm_cachescope.tiers.breaker import Breaker
from vllm_cachescope.tiers.local_usage import LocalUsage
from vllm_cachescope.tiers.store import (
    ForeignSecret,
    Store,
    StoreFailed,
    StoreLate,
    StoreUnfit,
    Value,
    Written,
)

logger = logger_of(__name__)

GREET_EVERY_S = 20.0
"""How often a tier makes sure that it may still run on its store."""

PURGE_S = 60.0
"""How long a purge may take, in seconds; the store answers each of its steps within the timeout."""

READ_BATCH_BYTES = 4 << 20
"""What a thread loads at once: so little that a prompt's blocks arrive from the first to the last
although several threads read them."""

WRITE_BATCH_BYTES = 8 << 20
"""What a thread stores at once: so much that the pauses between batches, in which the answers are
waited for and the next batch's checksums are made, hardly count."""

STAGGER_S = 2.5e-7
"""How much sooner a block expires for each token that comes before its end in the prompt, in
seconds: 50 ms at 200,000 tokens."""


class Found(Enum):
    """The answer to `RemoteTier.seek`."""

    HIT = "hit"
    MISS = "miss"
    RETRY = "retry"


def expiry(used_at: float, ttl_s: int, end: int) -> float:
    """Return when a block of a prompt expires.

    All blocks of a prompt count from the same use, whenever they are stored, and the later ones
    expire a little sooner: where something must go, a prefix loses its end before its beginning.

    Args:
        used_at: when a request began to use the prompt, or ended, in seconds.
        ttl_s: the block's lifetime, in seconds.
        end: where the block ends in the prompt, in tokens.
    """
    return used_at + ttl_s - end * STAGGER_S


_FATES = {Written.REFUSED: BlockState.REFUSED, Written.EXPIRED: BlockState.GONE}
"""Fates of what was written, where that is not `BlockState.HELD`."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a tier may cost.

    Attributes:
        load_deadline_s: how long one request may wait for the tier, in seconds.
        load_share: the share of the time that computing its blocks would take for which it may
            wait instead, where that is longer, as long as the store sends something every
            ``load_deadline_s``.
        timeout_s: how long anything that no request waits for may take, in seconds.
        inflight_bytes: bytes queued or under way, in each direction.
        connections: threads that read, each with a connection of its own.
        failures: failures in a row after which the store is left alone.
        first_probe_s: time to the first probe after that, in seconds.
        longest_probe_s: longest time between probes, in seconds.
    """

    load_deadline_s: float
    load_share: float
    timeout_s: float
    inflight_bytes: int
    connections: int
    failures: int
    first_probe_s: float
    longest_probe_s: float


@dataclass(frozen=True, slots=True)
class Finished:
    """A load or a store that is over.

    Attributes:
        job_id: the job's number.
        complete: whether all of its keys were loaded or stored.
        loaded: the keys that were loaded and the lifetime class of each, in seconds; none for a
            store.
        request_id: for whom it was loaded; None for a store.
        nbytes: bytes of payload moved.
        seconds: from its submission to its end.
    """

    job_id: int
    complete: bool
    loaded: tuple[tuple[bytes, int], ...]
    request_id: str | None
    nbytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A block to be stored.

    Attributes:
        key: owner, block hash and group; see `keyspace.qualified`.
        slot: its bytes, which stay as they are until the store has finished.
        ttl_s: its lifetime class, in seconds.
        expires_at: when it expires unless it is used, on the tier's clock, in seconds; see
            `expiry`.
    """

    key: bytes
    slot: memoryview
    ttl_s: int
    expires_at: float


@dataclass(slots=True, eq=False)
class _Inquiry:
    """What one request has asked, and been told.

    Attributes:
        deadline: until when it waits for the tier.
        answers: by key; None while there is none yet.
        unsent: keys that were asked for since the last `RemoteTier.flush`.
        promised: bytes of the hits it was told of.
        over: whether it may start no further load: each request loads once, in one go, so that
            blocks that push each other out of memory cannot keep it waiting for ever.
        lost: keys that were found and not loaded, and why.
        trouble: why some of its questions were not answered; None if all were.
    """

    deadline: float
    answers: dict[bytes, bool | None] = field(default_factory=dict)
    unsent: list[bytes] = field(default_factory=list)
    promised: int = 0
    over: bool = False
    lost: dict[bytes, BlockState] = field(default_factory=dict)
    trouble: MissCause | None = None


@dataclass(slots=True, eq=False)
class _Load:
    """A load under way. Its keys are taken in order by several threads.

    Attributes:
        promised: until when it may go on in any case.
        deadline: until when it may go on while blocks keep coming.
        taken: how many keys a thread has taken on, or that were given up untaken.
        open: how many keys nothing is known of yet.
        lost: keys that are not loaded, and why.
    """

    job_id: int
    request_id: str
    keys: Sequence[bytes]
    slots: Sequence[memoryview]
    started: float
    promised: float
    deadline: float
    taken: int = 0
    open: int = 0
    loaded: list[tuple[bytes, int]] = field(default_factory=list)
    lost: dict[bytes, BlockState] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Store:
    job_id: int
    blocks: Sequence[Outgoing]
    started: float
    complete: bool
    taken: int = 0
    open: int = 0
    nbytes: int = 0


@dataclass(slots=True, eq=False)
class Purge:
    """A purge, which a thread of the tier's carries out.

    Attributes:
        prefix: what the keys of its entries begin with.
        entries: how many were deleted.
        over: whether it is over; only then may the rest be read.
        reason: why it is not known that all are gone; None if all are.
    """

    prefix: bytes
    entries: int = 0
    over: bool = False
    reason: str | None = None


class RemoteTier:
    """Loads blocks from a store and stores blocks in it, on threads of its own.

    Its methods are called from the scheduler's thread and do not block, `start`, `drain` and
    `close` apart.

    Args:
        name: the tier's name.
        new_store: makes a store for one thread; must not connect yet.
        slot_bytes: bytes per block.
        limits: what it may cost.
        clock: seconds, never running backwards; also the clock of all deadlines.
        random: a number in [0, 1).
        account: knows which entries are too many; None if nothing is, or the store knows.
    """

    def __init__(
        self,
        name: str,
        new_store: Callable[[], Store],
        slot_bytes: int,
        limits: Limits,
        clock: Callable[[], float],
        random: Callable[[], float],
        account: LocalUsage | None = None,
    ) -> None:
        self.name = name
        self._account = account
        self._new_store = new_store
        self._slot_bytes = slot_bytes
        self._limits = limits
        self._clock = clock
        self._breaker = Breaker(
            limits.failures, limits.first_probe_s, limits.longest_probe_s, clock, random
        )
        # A store may answer questions and be too slow for loads: the former must not hide that.
        self._read_breaker = Breaker(
            limits.failures, limits.first_probe_s, limits.longest_probe_s, clock, random
        )
        # A store that is full or read-only refuses writes and still answers reads.
        self._write_breaker = Breaker(
            1, limits.first_probe_s, limits.longest_probe_s, clock, random
        )
        self._inquiries: dict[str, _Inquiry] = {}
        # Requests that could not ask, and why.
        self._turned_away: dict[str, MissCause] = {}
        self._whereabouts = BlockStates()
        self._asked: list[_Inquiry] = []
        self._late_at = float("-inf")
        self._step_begins = True
        self._answers: SimpleQueue[tuple[_Inquiry, Sequence[bytes], Sequence[bool] | None]] = (
            SimpleQueue()
        )
        self._finished: SimpleQueue[Finished] = SimpleQueue()

        # What the threads share, under one lock.
        self._lock = threading.Lock()
        self._to_ask = threading.Condition(self._lock)
        self._to_load = threading.Condition(self._lock)
        self._to_store = threading.Condition(self._lock)
        self._idle = threading.Condition(self._lock)
        self._questions: list[tuple[_Inquiry, list[bytes]]] = []
        self._uses: dict[bytes, float] = {}
        self._loads: deque[_Load] = deque()
        self._loading: Counter[str] = Counter()
        self._arrived_at = float("-inf")
        self._stores: deque[_Store] = deque()
        self._purges: deque[Purge] = deque()
        self._batches = 0
        self._stopping = False
        self._loading_bytes = 0
        self._storing_bytes = 0
        self._counts: Counter[tuple[str, str]] = Counter()

        self._greeted = False
        self._greeted_once = threading.Event()
        # Whether engines with another secret use the store.
        self._foreign = False
        self._known: dict[str, Any] = {}
        self.address = new_store().address
        self._threads = [
            threading.Thread(target=target, name=f"cachescope-{name}-{role}", daemon=True)
            for target, role in (
                (self._ask, "ask"),
                (self._write, "write"),
                *((self._read, f"read{i}") for i in range(limits.connections)),
            )
        ]

    def start(self) -> None:
        """Start the threads, and wait a moment for the store's first answer, so that what is
        wrong with it is said at start-up. A store that is down does not keep the tier from
        starting; it is asked again."""
        for thread in self._threads:
            thread.start()
        self._greeted_once.wait(self._limits.timeout_s)

    @property
    def usable(self) -> bool:
        """Whether the store answers and the tier may run on it."""
        return self._greeted and self._breaker.closed

    # Questions.

    def seek(self, request_id: str, key: bytes) -> Found:
        """Ask whether the store holds ``key``. `flush` sends the question."""
        inquiry = self._inquiries.get(request_id)
        if inquiry is None:
            if not self.usable or self._read_breaker.probe_in() > 0:
                self._turned_away[request_id] = self._trouble
                return Found.MISS
            self._turned_away.pop(request_id, None)
            inquiry = _Inquiry(self._clock() + self._limits.load_deadline_s)
            self._inquiries[request_id] = inquiry
        if inquiry.over or self._is_purged(key):
            return Found.MISS
        if self._step_begins:
            # Once in a step: an answer in the middle of a prompt's questions would have its end
            # loaded without its beginning.
            self._step_begins = False
            self._take_answers()
        if key not in inquiry.answers:
            inquiry.answers[key] = None
            if not inquiry.unsent:
                self._asked.append(inquiry)
            inquiry.unsent.append(key)
        answer = inquiry.answers[key]
        if answer is None:
            if self.usable and self._clock() < inquiry.deadline:
                return Found.RETRY
            self._answered_late(inquiry)
            return Found.MISS
        if not answer:
            return Found.MISS
        if self._loading_bytes + inquiry.promised + self._slot_bytes > self._limits.inflight_bytes:
            self._count("load", "dropped")
            inquiry.lost[key] = BlockState.CROWDED
            return Found.MISS
        inquiry.promised += self._slot_bytes
        return Found.HIT

    def _is_purged(self, key: bytes) -> bool:
        return bool(self._purges) and any(key.startswith(p.prefix) for p in tuple(self._purges))

    def _answered_late(self, inquiry: _Inquiry) -> None:
        inquiry.over = True
        inquiry.trouble = MissCause.TIMED_OUT if self.usable else self._trouble
        self._count("lookup", "late", sum(a is None for a in inquiry.answers.values()))
        # Counted here and not by the thread that asks: it may be busy with an earlier question.
        # Requests that wait at the same time count once.
        now = self._clock()
        if self.usable and inquiry.deadline - self._limits.load_deadline_s >= self._late_at:
            self._late_at = now
            self._failed("no answer in time")

    def flush(self) -> None:
        """Send what was asked in this step, as one batch. To be called at the end of each step."""
        self._step_begins = True
        if not self._asked:
            return
        with self._lock:
            for inquiry in self._asked:
                self._questions.append((inquiry, inquiry.unsent))
                inquiry.unsent = []
            self._to_ask.notify()
        self._asked.clear()

    def forget(self, request_id: str) -> None:
        """The request is over, or starts anew."""
        self._inquiries.pop(request_id, None)
        self._turned_away.pop(request_id, None)

    def lost(self, request_id: str, key: bytes) -> Absence | None:
        """Return why ``key`` was found for the request and not loaded; None if that was not so."""
        inquiry = self._inquiries.get(request_id)
        if inquiry is None:
            return None
        if (fate := inquiry.lost.get(key)) is not None:
            return ABSENCES[fate]
        if inquiry.answers.get(key):
            return Absence(MissCause.EVICTED, detail="the CPU tier had no room to load it into")
        return None

    def absence(self, request_id: str, key: bytes) -> Absence | None:
        """Return why the tier had no answer for the request, or not ``key``; None if it was asked
        and, as far as is known, never had it."""
        inquiry = self._inquiries.get(request_id)
        trouble = inquiry.trouble if inquiry else self._turned_away.get(request_id)
        fate = self._whereabouts.find(key)
        if trouble is not None and fate in (None, BlockState.HELD):
            return Absence(trouble, certain=fate is BlockState.HELD)
        return None if fate in (None, BlockState.HELD) else ABSENCES[fate]

    @property
    def _trouble(self) -> MissCause:
        foreign = self._foreign
        return MissCause.HASH_SETTINGS_DIFFER if foreign else MissCause.TIER_UNAVAILABLE

    def used(self, keys: Iterable[tuple[bytes, float]]) -> None:
        """Each key was used and lives on until a time (see `expiry`), where the store holds it."""
        if not self.usable:
            return
        with self._lock:
            for key, expires_at in keys:
                self._uses[key] = max(expires_at, self._uses.get(key, 0.0))
            self._to_ask.notify()

    # Transfers.

    def load(
        self,
        job_id: int,
        request_id: str,
        keys: Sequence[bytes],
        slots: Sequence[memoryview],
        worth_s: float = 0.0,
    ) -> None:
        """Load each key into its slot; `finished` tells which ones were.

        Args:
            job_id: the job's number.
            request_id: for whom.
            keys: the keys, in the order of the prompt.
            slots: where each goes.
            worth_s: how long computing them would take, in seconds; 0 if that is not known.
        """
        now = self._clock()
        inquiry = self._inquiries.get(request_id)
        promised = now + self._limits.load_deadline_s
        if inquiry is not None:
            inquiry.over = True
            inquiry.promised = 0
            promised = inquiry.deadline
        asked = promised - self._limits.load_deadline_s
        deadline = max(promised, asked + self._limits.load_share * worth_s)
        load = _Load(job_id, request_id, keys, slots, now, promised, deadline, open=len(keys))
        if inquiry is not None:
            load.lost = inquiry.lost
        with self._lock:
            self._loading_bytes += len(keys) * self._slot_bytes
            self._loading[request_id] += 1
            self._loads.append(load)
            self._to_load.notify_all()

    def is_loading(self, request_id: str) -> bool:
        """Whether a load for the request is under way. To be asked in each step."""
        if self._loads:
            self._give_up_overdue()
        return request_id in self._loading

    def store(self, job_id: int, blocks: Sequence[Outgoing], complete: bool = True) -> None:
        """Store blocks that the store does not hold yet.

        Args:
            job_id: the job's number; `finished` tells when the slots are no longer needed.
            blocks: the blocks in prompt order; those at the end are dropped if there are too many.
            complete: whether these are all blocks of the job.
        """
        with self._lock:
            room = max(0, self._limits.inflight_bytes - self._storing_bytes) // self._slot_bytes
            fate = BlockState.DROPPED
            if not self.usable or self._write_breaker.probe_in() > 0:
                room, fate = 0, BlockState.UNSTORED if not self.usable else BlockState.REFUSED
            taken = blocks[:room]
            if len(taken) < len(blocks):
                self._whereabouts.note((block.key for block in blocks[room:]), fate)
                self._counts["store", "dropped"] += len(blocks) - len(taken)
            store = _Store(
                job_id,
                taken,
                self._clock(),
                complete and len(taken) == len(blocks),
                open=len(taken),
            )
            if not taken:
                self._end_store(store)
                return
            self._storing_bytes += len(taken) * self._slot_bytes
            self._stores.append(store)
            self._to_store.notify()

    def left_out(self, keys: Iterable[bytes]) -> None:
        """Keys of a prompt that is longer than its organisation's quota are not to be stored."""
        self._whereabouts.note(keys, BlockState.CUT)

    def purge(self, prefix: bytes) -> Purge:
        """Begin to delete every entry whose key begins with ``prefix``. Until that is over, they
        are misses, and none that was to be stored is stored any more."""
        purge = Purge(prefix)
        with self._lock:
            for store in list(self._stores):
                self._give_up_blocks(store, lambda block: block.key.startswith(prefix))
            if self.usable and not self._stopping:
                self._purges.append(purge)
                self._to_store.notify()
            else:
                purge.over, purge.reason = True, self._breaker.reason or "it has not answered yet"
        return purge

    def finished(self) -> list[Finished]:
        """Return the loads and stores that are over since the last time."""
        if self._loads or self._stores:
            self._give_up_overdue()
        over: list[Finished] = []
        while True:
            try:
                over.append(self._finished.get_nowait())
            except Empty:
                return over

    def drain(self) -> None:
        """Give up what no thread has begun, and wait until the threads are done with the rest.
        What they have begun is over by its deadline."""
        with self._lock:
            self._give_up(list(self._loads), list(self._stores), "dropped")
            self._idle.wait_for(lambda: self._batches == 0)

    def close(self) -> None:
        """End the threads and their connections.

        Raises:
            RuntimeError: if a thread still uses a slot.
        """
        with self._lock:
            self._stopping = True
            self._give_up(list(self._loads), list(self._stores), "dropped")
            self._give_up_purges("the engine is going down")
            for condition in (self._to_ask, self._to_load, self._to_store):
                condition.notify_all()
        patience = self._clock() + 2 * max(self._limits.timeout_s, self._limits.load_deadline_s)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.1, patience - self._clock()))
        if self._batches:
            raise RuntimeError(f"tier {self.name}: a transfer does not end")

    # What others may know.

    def take_counts(self) -> dict[tuple[str, str], int]:
        """Return how many keys had which ``(operation, outcome)`` since the last time; the
        operation ``evict`` has reasons for outcomes."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return counts

    def health(self) -> dict[str, Any]:
        """Return the tier's state in plain data."""
        return {
            "name": self.name,
            "address": self.address,
            "up": self.usable,
            "readable": self.usable and self._read_breaker.closed,
            "writable": self.usable and self._write_breaker.closed,
            "reason": (
                self._breaker.reason or self._read_breaker.reason or self._write_breaker.reason
            ),
            "loading_bytes": self._loading_bytes,
            "storing_bytes": self._storing_bytes,
            **self._known,
            **({} if self._account is None else {"orgs": self._account.shown(self._clock())}),
        }

    # The thread that asks.

    def _ask(self) -> None:
        store = self._new_store()
        greet_at = 0.0
        while True:
            with self._lock:
                pause = greet_at - self._clock() if self.usable else self._breaker.probe_in()
                if not (self._stopping or self._questions or self._uses) and pause > 0:
                    self._to_ask.wait(pause)
                if self._stopping:
                    break
                questions, self._questions = self._questions, []
                uses, self._uses = self._uses, {}
            try:
                if not self.usable or self._clock() >= greet_at:
                    if self._breaker.probe_in() > 0:
                        continue
                    self._known = store.greet(self._clock() + self._limits.timeout_s)
                    greet_at = self._clock() + GREET_EVERY_S
                    self._now_usable()
                self._foreign = False
                if questions:
                    self._answer(store, questions)
                if uses:
                    store.refresh(list(uses.items()), self._clock() + self._limits.timeout_s)
                    if self._account is not None:
                        self._account.used(uses.items())
                self._count("reclaim", "expired", store.take_reclaimed())
            except StoreUnfit as error:
                self._foreign = isinstance(error, ForeignSecret)
                self._failed(str(error), at_once=True)
            except StoreFailed as error:
                # Without the handshake nothing may be asked, so one failure is enough there.
                self._failed(str(error), at_once=not self._greeted)
            except Exception as error:
                logger.exception("Tier %s: a question failed", self.name)
                store.close()
                self._failed(str(error), at_once=True)
            self._greeted_once.set()
        store.close()

    def _answer(self, store: Store, questions: list[tuple[_Inquiry, list[bytes]]]) -> None:
        now = self._clock()
        live = [(inquiry, keys) for inquiry, keys in questions if inquiry.deadline > now]
        if not live:
            return
        flat = [key for _, keys in live for key in keys]
        found: Sequence[bool] | None = None
        try:
            if not store.alive():
                store.connect(self._clock() + self._limits.timeout_s)
            found = store.find(flat, min(inquiry.deadline for inquiry, _ in live))
            self._breaker.succeeded()
            self._count("lookup", "hit", sum(found))
            self._count("lookup", "miss", len(found) - sum(found))
        except StoreLate:
            # The requests have noticed by themselves; see `_answered_late`.
            return
        except StoreFailed as error:
            self._count("lookup", "failed", len(flat))
            self._failed(str(error))
        start = 0
        for inquiry, keys in live:
            answers = None if found is None else found[start : start + len(keys)]
            self._answers.put((inquiry, keys, answers))
            start += len(keys)

    def _take_answers(self) -> None:
        while True:
            try:
                inquiry, keys, found = self._answers.get_nowait()
            except Empty:
                return
            if found is None:
                inquiry.trouble = self._trouble
                inquiry.answers.update(dict.fromkeys(keys, False))
                continue
            inquiry.answers.update(zip(keys, found, strict=True))
            answers = list(zip(keys, found, strict=True))
            self._whereabouts.note((key for key, there in answers if there), BlockState.HELD)
            self._whereabouts.missed(key for key, there in answers if not there)

    # The threads that read.

    def _read(self) -> None:
        store = self._new_store()
        while self._ready(store, self._to_load, self._loads):
            with self._lock:
                if not self._loads:
                    continue
                load, first, last = self._take_load()
            try:
                self._fill(store, load, first, last)
            finally:
                self._batch_over()
        store.close()

    def _take_load(self) -> tuple[_Load, int, int]:
        load = self._loads[0]
        first = load.taken
        last = min(len(load.keys), first + max(1, READ_BATCH_BYTES // self._slot_bytes))
        load.taken = last
        if last == len(load.keys):
            self._loads.popleft()
        self._batches += 1
        return load, first, last

    def _fill(self, store: Store, load: _Load, first: int, last: int) -> None:
        keys, slots = load.keys[first:last], load.slots[first:last]
        loaded: list[tuple[bytes, int]] = []
        damaged: list[bytes] = []
        lost: dict[bytes, BlockState] = {}
        outcomes: Counter[tuple[str, str]] = Counter()
        reached, begun = 0, self._clock()
        had_s = self._latest(load) - begun
        try:
            heads = store.read(keys, slots, lambda: self._latest(load))
            for key, slot, head in zip(keys, slots, heads, strict=True):
                reached += 1
                self._arrived_at = self._clock()
                if head is None:
                    outcomes["load", "gone"] += 1
                    lost[key] = BlockState.GONE
                    continue
                try:
                    loaded.append((key, envelope.check(key, head, slot).ttl_s))
                except envelope.BadEnvelope as error:
                    logger.warning("Tier %s: a value is unusable: %s", self.name, error)
                    damaged.append(key)
                    lost[key] = BlockState.DAMAGED
            self._breaker.succeeded()
            self._read_breaker.succeeded()
            if damaged:
                store.delete(damaged, self._clock() + self._limits.timeout_s)
        except StoreFailed as error:
            late = isinstance(error, StoreLate)
            outcomes["load", "late" if late else "failed"] += len(keys) - reached
            lost |= dict.fromkeys(keys[reached:], BlockState.LATE if late else BlockState.UNREAD)
            # A store that had little time, or used it, is slow and not dead.
            tried = had_s >= self._limits.load_deadline_s / 2
            with self._lock:
                if load in self._loads:
                    # What comes after a gap is of no use.
                    self._give_up([load], [], "late" if late else "failed")
            if not late:
                self._failed(str(error))
            if reached == 0 and (tried or not late) and self._read_breaker.failed(str(error)):
                logger.warning(
                    "Tier %s at %s is not read from for a while: %s", self.name, self.address, error
                )
        except Exception:
            # A mistake of ours must not keep a request waiting.
            logger.exception("Tier %s: a load failed", self.name)
            store.close()
            outcomes["load", "failed"] += len(keys) - reached
            lost |= dict.fromkeys(keys[reached:], BlockState.UNREAD)
        self._whereabouts.note(
            (key for key, fate in lost.items() if fate is BlockState.GONE), BlockState.GONE
        )
        self._whereabouts.note(damaged, BlockState.DAMAGED)
        outcomes["load", "hit"] += len(loaded)
        outcomes["load", "damaged"] += len(damaged)
        with self._lock:
            self._counts.update(outcomes)
            load.loaded += loaded
            load.lost |= lost
            self._resolve_load(load, len(keys))

    def _latest(self, load: _Load) -> float:
        """Return until when a load may go on if nothing comes from here on."""
        patience = self._arrived_at + self._limits.load_deadline_s
        return min(load.deadline, max(load.promised, patience))

    def _resolve_load(self, load: _Load, keys: int) -> None:
        self._loading_bytes -= keys * self._slot_bytes
        load.open -= keys
        if load.open == 0:
            self._loading -= Counter((load.request_id,))
            self._finished.put(
                Finished(
                    load.job_id,
                    len(load.loaded) == len(load.keys),
                    tuple(load.loaded),
                    load.request_id,
                    len(load.loaded) * self._slot_bytes,
                    self._clock() - load.started,
                )
            )

    # The thread that writes. It purges as well, so that nothing is written meanwhile.

    def _write(self) -> None:
        store = self._new_store()
        while self._ready(store, self._to_store, self._stores, self._purges):
            with self._lock:
                purge = self._purges[0] if self._purges else None
            if purge is not None:
                self._carry_out(store, purge)
                continue
            with self._lock:
                if not self._stores:
                    continue
                job, blocks = self._take_store()
            try:
                self._put(store, job, blocks)
            finally:
                self._batch_over()
        store.close()

    def _carry_out(self, store: Store, purge: Purge) -> None:
        try:
            purge.entries = store.purge(purge.prefix, self._clock() + PURGE_S)
        except StoreFailed as error:
            purge.reason = str(error)
        except Exception as error:
            logger.exception("Tier %s: a purge failed", self.name)
            store.close()
            purge.reason = str(error)
        if self._account is not None:
            self._account.purged(purge.prefix)
        self._count("evict", "purge", purge.entries)
        with self._lock:
            if purge in self._purges:
                self._purges.remove(purge)
            purge.over = True

    def _take_store(self) -> tuple[_Store, Sequence[Outgoing]]:
        job = self._stores[0]
        first = job.taken
        job.taken = min(len(job.blocks), first + max(1, WRITE_BATCH_BYTES // self._slot_bytes))
        if job.taken == len(job.blocks):
            self._stores.popleft()
        self._batches += 1
        return job, job.blocks[first : job.taken]

    def _put(self, store: Store, job: _Store, blocks: Sequence[Outgoing]) -> None:
        outcomes: Counter[tuple[str, str]] = Counter()
        written: list[Written] = []
        fates: defaultdict[BlockState, list[bytes]] = defaultdict(list)
        try:
            values = [
                Value(
                    block.key,
                    envelope.header(block.key, block.slot, envelope.Lifetime(block.ttl_s)),
                    block.slot,
                    block.expires_at,
                )
                for block in blocks
            ]
            written = store.write(values, self._clock() + self._limits.timeout_s)
            self._keep_quotas(store, blocks, written)
            for block, result in zip(blocks, written, strict=True):
                fates[_FATES.get(result, BlockState.HELD)].append(block.key)
            self._breaker.succeeded()
            if Written.REFUSED not in written:
                self._write_breaker.succeeded()
            elif self._write_breaker.failed(f"it refuses writes: {store.refusal}"):
                logger.warning(
                    "Tier %s at %s refuses writes: %s", self.name, self.address, store.refusal
                )
        except StoreFailed as error:
            outcomes["store", "failed"] = len(blocks)
            self._failed(str(error))
        except Exception:
            logger.exception("Tier %s: a store failed", self.name)
            store.close()
            outcomes["store", "failed"] = len(blocks)
        if not written:
            fates[BlockState.UNSTORED] += [block.key for block in blocks]
        for fate, keys in fates.items():
            self._whereabouts.note(keys, fate)
        for result in written:
            outcomes["store", result.value] += 1
        stored = written.count(Written.STORED)
        with self._lock:
            self._counts.update(outcomes)
            job.nbytes += stored * self._slot_bytes
            job.complete &= stored + written.count(Written.PRESENT) == len(blocks)
            self._storing_bytes -= len(blocks) * self._slot_bytes
            job.open -= len(blocks)
            if job.open == 0:
                self._end_store(job)

    def _keep_quotas(
        self, store: Store, blocks: Sequence[Outgoing], written: Sequence[Written]
    ) -> None:
        gone = store.take_given_up()
        if self._account is not None:
            stored = [
                (block.key, block.expires_at)
                for block, result in zip(blocks, written, strict=True)
                if result is Written.STORED
            ]
            mine = self._account.stored(stored, self._clock())
            if mine:
                store.delete(mine, self._clock() + self._limits.timeout_s)
                gone += mine
        self._whereabouts.note(gone, BlockState.CUT)
        self._count("evict", "quota", len(gone))

    def _end_store(self, job: _Store) -> None:
        self._finished.put(
            Finished(job.job_id, job.complete, (), None, job.nbytes, self._clock() - job.started)
        )

    # Whether the store is alive.

    def _ready(self, store: Store, work: threading.Condition, *queues: deque[Any]) -> bool:
        """Wait until there is something in one of ``queues`` and a connection to do it with.

        Connecting may hang where no deadline reaches, as in a name server. Therefore a thread
        takes on nothing before it has a connection.

        Returns:
            False if the thread is to end.
        """
        while not self._stopping:
            if not store.alive():
                with self._lock:
                    work.wait_for(lambda: self._stopping or self.usable)
                if not self._stopping:
                    try:
                        store.connect(self._clock() + self._limits.timeout_s)
                    except StoreFailed as error:
                        self._failed(str(error))
                continue
            with self._lock:
                work.wait_for(lambda: self._stopping or any(queues))
            # Servers close connections that idle.
            if store.alive():
                return not self._stopping
        return False

    def _batch_over(self) -> None:
        with self._lock:
            self._batches -= 1
            self._idle.notify_all()

    def _now_usable(self) -> None:
        came_back = self._breaker.succeeded() or not self._greeted
        self._greeted = True
        if not came_back:
            return
        used, capacity = self._known["used_bytes"], self._known["capacity_bytes"]
        logger.info(
            "Tier %s at %s is up: %.1f MiB used of %s",
            self.name,
            self.address,
            used / 2**20,
            f"{capacity / 2**20:.1f} MiB" if capacity else "no set limit",
        )
        with self._lock:
            self._to_load.notify_all()
            self._to_store.notify_all()

    def _failed(self, reason: str, at_once: bool = False) -> None:
        known = self._breaker.reason
        opened = self._breaker.trip(reason) if at_once else self._breaker.failed(reason)
        if opened or (not self._breaker.closed and self._breaker.reason != known):
            logger.warning(
                "Tier %s at %s is left alone, every request runs as if it held nothing: %s",
                self.name,
                self.address,
                reason,
            )
        if not self._breaker.closed:
            self._greeted = False
            with self._lock:
                self._give_up_purges(reason)
                self._to_ask.notify()

    def _give_up_overdue(self) -> None:
        now = self._clock()
        with self._lock:
            if self.usable:
                overdue = [load for load in self._loads if self._latest(load) <= now]
                self._give_up(overdue, [], "late")
            else:
                self._give_up(list(self._loads), list(self._stores), "dropped")

    def _give_up(self, loads: list[_Load], stores: list[_Store], outcome: str) -> None:
        """Take back what no thread has begun. Needs the lock."""
        for load in loads:
            self._loads.remove(load)
            untaken = len(load.keys) - load.taken
            load.taken = len(load.keys)
            self._counts["load", outcome] += untaken
            fate = BlockState.LATE if outcome == "late" else BlockState.UNREAD
            load.lost |= dict.fromkeys(load.keys[len(load.keys) - untaken :], fate)
            self._resolve_load(load, untaken)
        for store in stores:
            self._give_up_blocks(store, lambda block: True, outcome)

    def _give_up_blocks(
        self, store: _Store, given_up: Callable[[Outgoing], bool], outcome: str = "dropped"
    ) -> None:
        """Take back those blocks of a store that no thread has begun. Needs the lock."""
        kept = [block for block in store.blocks[store.taken :] if not given_up(block)]
        gone = (block.key for block in store.blocks[store.taken :] if given_up(block))
        self._whereabouts.note(gone, BlockState.UNSTORED)
        dropped = len(store.blocks) - store.taken - len(kept)
        if dropped:
            store.blocks = [*store.blocks[: store.taken], *kept]
            self._counts["store", outcome] += dropped
            self._storing_bytes -= dropped * self._slot_bytes
            store.complete = False
            store.open -= dropped
        if not kept:
            self._stores.remove(store)
            if store.open == 0:
                self._end_store(store)

    def _give_up_purges(self, reason: str) -> None:
        """End the purges that no thread can carry out. Needs the lock."""
        for purge in self._purges:
            purge.over, purge.reason = True, reason
        self._purges.clear()

    def _count(self, operation: str, outcome: str, keys: int = 1) -> None:
        if keys:
            with self._lock:
                self._counts[operation, outcome] += keys
