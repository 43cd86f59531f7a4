"""The inquiries of requests at a remote tier, and the thread that asks the store."""

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from queue import Empty, SimpleQueue

from vllm_cachescope.cache.miss_causes import NO_ROOM, MissCause
from vllm_cachescope.logs import logger_of
from vllm_cachescope.tiers.block_states import ABSENCES, Absence, BlockState
from vllm_cachescope.tiers.context import TierContext
from vllm_cachescope.tiers.joining import join
from vllm_cachescope.tiers.store import Store, StoreFailed, StoreLate, StoreUnfit

logger = logger_of(__name__)


class Lookup(Enum):
    """The answer to a lookup: HIT if the store holds the key, RETRY if that is not known yet."""

    HIT = "hit"
    MISS = "miss"
    RETRY = "retry"


@dataclass(slots=True, eq=False)
class Inquiry:
    """The lookups of one request, and the answers that it was told.

    Only the scheduler's thread changes it, ``failures`` apart.

    Attributes:
        deadline: until when the request waits for the tier, on the tier's clock, in seconds.
        answers: whether the store holds a key; None while that is not known yet.
        unsent: keys that were asked for since the last `Inquiries.flush`.
        promised_bytes: bytes of the hits that the request was told of since its last load.
        most_bytes: how many bytes it may load in one go, if it is to load a part only.
        over: whether the request may start no further load. Each request loads once, in one go, so
            that blocks that push each other out of memory cannot keep it waiting for ever; unless
            it has brought to safety what it has loaded, and resumes.
        failures: keys that were found and not loaded, and why. The request's `LoadJob` has the
            same mapping, which threads add to; here single keys are read.
        trouble: why some of the request's questions were not answered; None if all were.
        given_up: why the request does not load what was found; None while it may.
    """

    deadline: float
    answers: dict[bytes, bool | None] = field(default_factory=dict)
    unsent: list[bytes] = field(default_factory=list)
    promised_bytes: int = 0
    most_bytes: int | None = None
    over: bool = False
    failures: dict[bytes, BlockState] = field(default_factory=dict)
    trouble: MissCause | None = None
    given_up: str | None = None


class Inquiries:
    """The lookups of all requests, and the one thread that asks the store.

    The thread sends what was asked in one step as one batch, prolongs the lives of entries that
    were used, and greets the store: it is the thread that finds out whether the store is usable.

    The public methods are called on the scheduler's thread and never wait for the store. That
    thread and the one that asks share the fields under the lock, and ``_answers``, a queue.
    """

    def __init__(self, tier: TierContext) -> None:
        self._tier = tier
        # The scheduler's thread only.
        self._inquiries: dict[str, Inquiry] = {}
        # Requests that could not ask, and why.
        self._turned_away: dict[str, MissCause] = {}
        self._asked: list[Inquiry] = []
        self._late_at = float("-inf")
        self._step_begins = True

        self._answers: SimpleQueue[tuple[Inquiry, Sequence[bytes], Sequence[bool] | None]] = (
            SimpleQueue()
        )
        # Under the lock.
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._questions: list[tuple[Inquiry, list[bytes]]] = []
        self._asking = 0
        self._touched: dict[bytes, float] = {}
        self._stopping = False
        self._thread = threading.Thread(
            target=self._run, name=f"cachescope-{tier.name}-ask", daemon=True
        )

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def wake(self) -> None:
        """Have the thread see whether the store is to be greeted. Called on any thread."""
        with self._lock:
            self._work.notify()

    @property
    def asking(self) -> int:
        """How many keys the store is or will be asked for."""
        return self._asking

    @property
    def touching(self) -> int:
        """How many keys wait to have their lives prolonged."""
        return len(self._touched)

    def stop(self) -> None:
        """Have the thread end once the store has answered; `join` waits for that."""
        with self._lock:
            self._stopping = True
            self._work.notify_all()

    def join(self, deadline: float) -> None:
        """Wait until the thread has ended, or for the deadline on the tier's clock."""
        join([self._thread], deadline, self._tier.clock)

    # Lookups.

    def open(self, request_id: str) -> Inquiry | None:
        """Return the inquiry of a request, which begins with its first question; None if the store
        is not to be asked now."""
        inquiry = self._inquiries.get(request_id)
        if inquiry is None:
            availability = self._tier.availability
            if not availability.usable or availability.reads.probe_in() > 0:
                self._turned_away[request_id] = availability.miss_cause
                return None
            self._turned_away.pop(request_id, None)
            inquiry = Inquiry(self._tier.clock() + self._tier.limits.load_deadline_s)
            self._inquiries[request_id] = inquiry
        return inquiry

    def ask(self, inquiry: Inquiry, key: bytes) -> Lookup:
        """Return whether the store holds ``key``, as far as is known. `flush` sends the question.

        Past its deadline an inquiry gets no RETRY any more, and is over: no request waits longer
        for answers.

        Args:
            inquiry: the request's, which is not over.
            key: see `keyspace.qualified`.
        """
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
            if self._tier.availability.usable and self._tier.clock() < inquiry.deadline:
                return Lookup.RETRY
            self._end_unanswered(inquiry)
            return Lookup.MISS
        return Lookup.HIT if answer else Lookup.MISS

    def promise(self, inquiry: Inquiry, key: bytes, room_bytes: int) -> Lookup:
        """Tell a request that it may load ``key``, which was found. If there is no room to load
        it, that is a miss, and counted as dropped.

        Args:
            inquiry: the request's, which is not over.
            key: see `keyspace.qualified`.
            room_bytes: how many bytes may be loaded besides what is being loaded.
        """
        promised_bytes = inquiry.promised_bytes + self._tier.slot_bytes
        if inquiry.most_bytes is not None and promised_bytes > inquiry.most_bytes:
            return Lookup.MISS
        if promised_bytes > room_bytes:
            self._tier.counts.add("load", "dropped")
            inquiry.failures[key] = BlockState.CROWDED
            return Lookup.MISS
        inquiry.promised_bytes = promised_bytes
        return Lookup.HIT

    def flush(self) -> None:
        """Send what was asked in this step, as one batch. To be called at the end of each step."""
        self._step_begins = True
        if not self._asked:
            return
        with self._lock:
            for inquiry in self._asked:
                self._asking += len(inquiry.unsent)
                self._questions.append((inquiry, inquiry.unsent))
                inquiry.unsent = []
            self._work.notify()
        self._asked.clear()

    def begin_load(self, request_id: str) -> Inquiry | None:
        """Return the inquiry of a request that loads its hits now, and asks nothing any more."""
        inquiry = self._inquiries.get(request_id)
        if inquiry is not None:
            inquiry.over = True
            inquiry.promised_bytes = 0
        return inquiry

    def restart(self, request_id: str) -> None:
        """Let a request wait for the tier as long as it may from now on: until now it has waited
        for something else."""
        if (inquiry := self._inquiries.get(request_id)) is not None:
            inquiry.deadline = self._tier.clock() + self._tier.limits.load_deadline_s

    def limit(self, request_id: str, keys: int | None) -> None:
        """Let a request load no more than ``keys`` blocks in one go; None for no such limit."""
        if (inquiry := self._inquiries.get(request_id)) is not None:
            inquiry.most_bytes = None if keys is None else keys * self._tier.slot_bytes

    def resume(self, request_id: str) -> bool:
        """Let a request load more of what was found for it: what it has loaded is where nothing
        that it loads can push it out. Returns whether nothing has failed for it until now."""
        inquiry = self._inquiries.get(request_id)
        if inquiry is None or inquiry.given_up or inquiry.trouble or inquiry.failures:
            return False
        inquiry.over = False
        self.restart(request_id)
        return True

    def give_up(self, request_id: str, why: str) -> None:
        """A request loads nothing of what was found for it, and asks nothing any more."""
        if (inquiry := self._inquiries.get(request_id)) is not None:
            inquiry.over = True
            inquiry.given_up = why

    def end(self, request_id: str) -> None:
        """The request is over, or starts anew."""
        self._inquiries.pop(request_id, None)
        self._turned_away.pop(request_id, None)

    def touch(self, entries: Iterable[tuple[bytes, float]]) -> None:
        """Let each key live until its time at least, in the store if that holds it.

        Args:
            entries: keys, each with its time on the tier's clock, in seconds; see `expiry.expiry`.
        """
        if not self._tier.availability.usable:
            return
        with self._lock:
            for key, expires_at in entries:
                self._touched[key] = max(expires_at, self._touched.get(key, 0.0))
            self._work.notify()

    # Why a block was not there.

    def load_failure(self, request_id: str, key: bytes) -> Absence | None:
        """Return why ``key`` was found for the request and not loaded; None if the store was not
        known to hold it."""
        inquiry = self._inquiries.get(request_id)
        if inquiry is None:
            return None
        if (state := inquiry.failures.get(key)) is not None:
            return ABSENCES[state]
        if inquiry.answers.get(key):
            if inquiry.given_up is not None:
                return Absence(MissCause.TIMED_OUT, detail=inquiry.given_up)
            return Absence(MissCause.EVICTED, detail=f"{NO_ROOM} to load it into")
        return None

    def absence(self, request_id: str, key: bytes) -> Absence | None:
        """Return why the tier had no answer for the request, or did not hold ``key``; None if it
        was asked and, as far as is known, never held the key."""
        inquiry = self._inquiries.get(request_id)
        trouble = inquiry.trouble if inquiry else self._turned_away.get(request_id)
        state = self._tier.states.find(key)
        if state is not None and state is not BlockState.HELD:
            return ABSENCES[state]
        if trouble is None:
            return None
        return Absence(trouble, certain=state is BlockState.HELD)

    def _end_unanswered(self, inquiry: Inquiry) -> None:
        availability = self._tier.availability
        inquiry.over = True
        usable = availability.usable
        inquiry.trouble = MissCause.TIMED_OUT if usable else availability.miss_cause
        late = sum(answer is None for answer in inquiry.answers.values())
        self._tier.counts.add("lookup", "late", late)
        # Reported here and not by the thread that asks, which may be busy with an earlier question.
        # Requests that wait at the same time count as one failure.
        began_at = inquiry.deadline - self._tier.limits.load_deadline_s
        if usable and began_at >= self._late_at:
            self._late_at = self._tier.clock()
            availability.failed("no answer in time")

    def _take_answers(self) -> None:
        states = self._tier.states
        while True:
            try:
                inquiry, keys, found = self._answers.get_nowait()
            except Empty:
                return
            if found is None:
                inquiry.trouble = self._tier.availability.miss_cause
                inquiry.answers.update(dict.fromkeys(keys, False))
                continue
            answers = list(zip(keys, found, strict=True))
            inquiry.answers.update(answers)
            states.note((key for key, there in answers if there), BlockState.HELD)
            states.missed(key for key, there in answers if not there)

    # The thread that asks.

    def _run(self) -> None:
        tier = self._tier
        store = tier.new_store()
        while self._wait_for_work():
            with self._lock:
                questions, self._questions = self._questions, []
                touched, self._touched = self._touched, {}
            asked = sum(len(keys) for _, keys in questions)
            try:
                # Without a greeting questions are dropped: the requests have noticed by themselves
                # that the store is not usable.
                if tier.availability.greet_if_due(store):
                    self._ask(store, questions, touched)
            except StoreUnfit as error:
                tier.availability.unfit(error)
            except StoreFailed as error:
                # While the store is not usable this was the greeting: one failure is enough there.
                tier.availability.failed(str(error), at_once=not tier.availability.usable)
            except Exception as error:
                logger.exception("Tier %s: a question failed", tier.name)
                store.close()
                tier.availability.failed(str(error), at_once=True)
            with self._lock:
                self._asking -= asked
        store.close()

    def _wait_for_work(self) -> bool:
        """Return whether there is something to do; False if the thread is to end."""
        with self._lock:
            pause_s = self._tier.availability.seconds_to_greeting()
            if not (self._stopping or self._questions or self._touched) and pause_s > 0:
                self._work.wait(pause_s)
            return not self._stopping

    def _ask(
        self,
        store: Store,
        questions: list[tuple[Inquiry, list[bytes]]],
        touched: dict[bytes, float],
    ) -> None:
        tier = self._tier
        if questions:
            self._find(store, questions)
        if touched:
            with tier.times.measure("touch"):
                store.touch(list(touched.items()), tier.timeout_at())
            if tier.local_usage is not None:
                tier.local_usage.touch(touched.items())
            if tier.inventory is not None:
                tier.inventory.touch(touched.items())
        tier.counts.add("reclaim", "expired", store.take_expired())
        tier.counts.add("reclaim", "damaged", store.take_damaged())
        if crowded := store.take_crowded():
            tier.states.note(crowded, BlockState.GONE)
            tier.counts.add("evict", "capacity", len(crowded))

    def _find(self, store: Store, questions: list[tuple[Inquiry, list[bytes]]]) -> None:
        tier = self._tier
        now = tier.clock()
        live = [(inquiry, keys) for inquiry, keys in questions if inquiry.deadline > now]
        if not live:
            return
        flat = [key for _, keys in live for key in keys]
        found: Sequence[bool] | None = None
        try:
            if not store.alive():
                store.connect(tier.timeout_at())
            with tier.times.measure("lookup"):
                found = store.find(flat, min(inquiry.deadline for inquiry, _ in live))
            tier.availability.answered()
            tier.counts.add("lookup", "hit", sum(found))
            tier.counts.add("lookup", "miss", len(found) - sum(found))
        except StoreLate:
            # The requests have noticed by themselves; see `_end_unanswered`.
            return
        except StoreFailed as error:
            tier.counts.add("lookup", "failed", len(flat))
            tier.availability.failed(str(error))
        start = 0
        for inquiry, keys in live:
            answers = None if found is None else found[start : start + len(keys)]
            self._answers.put((inquiry, keys, answers))
            start += len(keys)
