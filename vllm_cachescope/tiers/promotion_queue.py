"""The queue of promotions: which requests may bring blocks from remote tiers into the CPU tier, in
which order, and how long the others wait for room.

A request gets room for all of its blocks or for none: half of a prompt that pushes out half of
another helps neither. The order is that of arrival within an account, and the accounts take turns,
each weighed by the room that it has had (start-time fair queueing), so that many requests of one
delay a request of another by no more than its own share.

Waiting is bounded three times over. A request waits for ``share`` of the time in which the engine
could compute what it and those before it want, and never longer than ``limit_s``. And a request
that could not be served by then, as fast as room has been coming free, does not wait at all: under
overload requests compute, and the queue does not grow. Only that time counts in which the engine
comes round to a request: while it has no free blocks on the device, say, it waits for these.

Nothing here knows of memory or of tiers; times are parameters, in seconds on one clock that never
runs backwards. Room is counted in slots, one a block.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, StrEnum

from vllm_cachescope.metrics import WAIT_BUCKETS
from vllm_cachescope.observations import Observations

NEWEST_WEIGHT = 0.3
"""The weight of the newest promotion in the moving average of how fast room comes free."""


class Verdict(Enum):
    """What a request is to do now: bring its blocks nearer, wait, or compute them."""

    GO = "go"
    WAIT = "wait"
    COMPUTE = "compute"


class Room(Enum):
    """Whether there is room for a request: ENOUGH, or LACKING; or its account has SPENT what it may
    have, and others do not wait for that."""

    ENOUGH = "enough"
    LACKING = "lacking"
    SPENT = "spent"


class WaitOutcome(StrEnum):
    """How a wait for room ended.

    Attributes:
        AT_ONCE: there was room, and no wait.
        WAITED: room came free in time.
        LATE: no room came free in time, and the request computes.
        TURNED_AWAY: none was to be expected in time, and the request computes at once.
        TIER_LOST: the tier that had the blocks failed meanwhile.
        CUT_OFF: the request ended meanwhile.
    """

    AT_ONCE = "at_once"
    WAITED = "waited"
    LATE = "late"
    TURNED_AWAY = "turned_away"
    TIER_LOST = "tier_lost"
    CUT_OFF = "cut_off"


@dataclass(slots=True, eq=False)
class _Ticket:
    """A request in the queue.

    Attributes:
        account: whose turn it takes.
        slots: how much room it wants, at least 1.
        number: counts arrivals.
        bound_s: how long it may wait.
        asked_in: the step in which it last asked.
        asked_at: when it last asked.
        waited_s: how long it has waited, while it asked in each step.
        passed_in: the last step in which its account had spent its room; others go first in that
            step and the next one.
        is_hopeless: whether its turn is not to be expected in time.
        admitted_at: when it got its room; None while it waits.
    """

    account: bytes
    slots: int
    number: int
    bound_s: float
    asked_in: int
    asked_at: float
    waited_s: float = 0.0
    passed_in: int = -2
    is_hopeless: bool = False
    admitted_at: float | None = None


class PromotionQueue:
    """Says who may promote, and counts how waits ended. Not thread-safe.

    For each request: `join` once, `ask` in each step until the verdict is not WAIT, and after GO
    `settle` once it needs the room no longer. `leave` at any time. A method that is told of a
    request which is not in the queue does nothing.

    Args:
        limit_s: the longest wait, in seconds.
        share: the share of the time that computing would take for which a request may wait; 0 for
            not at all.
    """

    def __init__(self, limit_s: float, share: float) -> None:
        self._limit_s = limit_s
        self._share = share
        self._tickets: dict[str, _Ticket] = {}
        self._waiting: dict[bytes, deque[_Ticket]] = {}
        # Whose turn it is; None if that is to be found out.
        self._head: _Ticket | None = None
        # The virtual time at which each account's next turn begins, and that of the latest turn.
        self._turns: dict[bytes, float] = {}
        self._now_serving = 0.0
        self._granted = 0
        self._arrivals = 0
        self._step = 0
        self._slots_per_s: float | None = None
        self._settled_at = float("-inf")
        self._waits = Observations(WAIT_BUCKETS)

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return sum(len(line) for line in self._waiting.values())

    @property
    def granted(self) -> int:
        """How much room was granted and is still needed."""
        return self._granted

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._tickets

    def join(
        self,
        request_id: str,
        account: bytes,
        slots: int,
        worth_s: float,
        now: float,
        resumes: bool = False,
    ) -> None:
        """Queue a request; `ask` follows at once.

        Args:
            request_id: the request.
            account: whose turn it takes.
            slots: how much room it wants, at least 1.
            worth_s: how long computing what it wants would take, in seconds; 0 if that is not
                known, and the wait is bounded by the limit alone.
            now: the time.
            resumes: whether it has had room for a part of what it wants, and goes on: it comes
                before those of its account that came later.
        """
        bound_s = self._limit_s
        if worth_s or not self._share:
            # If nobody waited, the engine would have those before it to compute as well.
            before = self._before(account, slots) if resumes else self._ahead_of(account, 0)
            worth_s *= (before + slots) / slots
            bound_s = min(bound_s, self._share * worth_s)
        ticket = _Ticket(account, slots, self._arrivals, bound_s, self._step, now)
        self._arrivals += 1
        self._tickets[request_id] = ticket
        line = self._waiting.setdefault(account, deque())
        if not line:
            self._turns[account] = max(self._turns.get(account, 0.0), self._now_serving)
        if resumes:
            line.appendleft(ticket)
            ahead = self._before(account, slots)
        else:
            line.append(ticket)
            ahead = self._ahead_of(account, 0) - slots
        self._head = None
        ticket.is_hopeless = self._seconds_for(ahead) > bound_s

    def ask(self, request_id: str, now: float, room: Callable[[], Room]) -> Verdict:
        """Return what a request that has joined is to do; after COMPUTE it has left.

        Args:
            request_id: the request.
            now: the time.
            room: returns whether there is room for it; called only if it is the request's turn.
        """
        ticket = self._tickets[request_id]
        if ticket.admitted_at is not None:
            return Verdict.GO
        if ticket.asked_in >= self._step - 1:
            ticket.waited_s += now - ticket.asked_at
        else:
            # What it waited for meanwhile was something else, as a device without free blocks.
            self._head = None
        ticket.asked_in, ticket.asked_at = self._step, now
        if ticket is self._next():
            found = room()
            if found is Room.ENOUGH:
                self._admit(ticket, now)
                return Verdict.GO
            if found is Room.SPENT:
                ticket.passed_in = self._step
                self._head = None
        if ticket.is_hopeless:
            self.leave(request_id, WaitOutcome.TURNED_AWAY)
        elif ticket.waited_s >= ticket.bound_s:
            self.leave(request_id, WaitOutcome.LATE)
        else:
            return Verdict.WAIT
        return Verdict.COMPUTE

    def resize(self, request_id: str, slots: int) -> None:
        """Note that a waiting request wants another amount of room, as when others have promoted
        what it shares with them."""
        ticket = self._tickets.get(request_id)
        if ticket is not None and ticket.admitted_at is None:
            ticket.slots = max(1, slots)

    def waited_s(self, request_id: str) -> float:
        """Return how long a request in the queue has waited for room until it last asked, in
        seconds."""
        return self._tickets[request_id].waited_s

    def bound_s(self, request_id: str) -> float:
        """Return how long a request in the queue may wait, in seconds."""
        return self._tickets[request_id].bound_s

    def settle(self, request_id: str, now: float) -> None:
        """Note that a request has no further use for its room: its blocks are on the device, or on
        their way there under a protection of their own."""
        ticket = self._tickets.get(request_id)
        if ticket is None:
            return
        if ticket.admitted_at is not None:
            began = max(ticket.admitted_at, self._settled_at)
            if now > began:
                newest = ticket.slots / (now - began)
                average = self._slots_per_s or newest
                self._slots_per_s = average + NEWEST_WEIGHT * (newest - average)
            self._settled_at = now
        self.leave(request_id)
        self._reckon()

    def leave(self, request_id: str, outcome: WaitOutcome = WaitOutcome.CUT_OFF) -> None:
        """Take a request out of the queue; ``outcome`` counts if it was waiting."""
        ticket = self._tickets.pop(request_id, None)
        if ticket is None:
            return
        if ticket.admitted_at is None:
            self._waits.add(ticket.waited_s, (outcome,))
            self._drop(ticket)
        else:
            self._granted -= ticket.slots
            self._forget()

    def end_step(self) -> None:
        """Note that a step is over. A request that did not ask in this step or the last one is
        passed over: it holds up nobody while the engine does not come round to it."""
        self._step += 1
        self._head = None

    def take_waits(self) -> Observations:
        """Return the waits that have ended since the last time, in seconds, by outcome."""
        waits, self._waits = self._waits, Observations(WAIT_BUCKETS)
        return waits

    def _next(self) -> _Ticket | None:
        """Return the ticket whose turn it is."""
        if self._head is not None:
            return self._head
        found: _Ticket | None = None
        first: tuple[float, int] | None = None
        for account, line in self._waiting.items():
            for ticket in line:
                if ticket.asked_in >= self._step - 1 and ticket.passed_in < self._step - 1:
                    turn = self._turns[account], ticket.number
                    if first is None or turn < first:
                        found, first = ticket, turn
                    break
        self._head = found
        return found

    def _admit(self, ticket: _Ticket, now: float) -> None:
        outcome = WaitOutcome.WAITED if ticket.waited_s > 0 else WaitOutcome.AT_ONCE
        self._waits.add(ticket.waited_s, (outcome,))
        ticket.admitted_at = now
        self._granted += ticket.slots
        self._now_serving = self._turns[ticket.account]
        self._turns[ticket.account] += ticket.slots
        self._drop(ticket)

    def _drop(self, ticket: _Ticket) -> None:
        """Take a ticket out of its line."""
        self._head = None
        line = self._waiting[ticket.account]
        line.remove(ticket)
        if not line:
            del self._waiting[ticket.account]
        self._forget()

    def _forget(self) -> None:
        """Forget the turns of accounts that have had no more than others: those do not count."""
        idle = not self._waiting and not self._granted
        passed = float("inf") if idle else self._now_serving
        for account in [a for a, turn in self._turns.items() if turn <= passed]:
            if account not in self._waiting:
                del self._turns[account]

    def _ahead_of(self, account: bytes, slots: int) -> int:
        """Return how much room is used or handed out before all that wait in an account have got
        theirs, and ``slots`` more."""
        own = sum(ticket.slots for ticket in self._waiting.get(account, ())) + slots
        return self._before(account, own) + own

    def _before(self, account: bytes, own: int) -> int:
        """Return how much room others use, or are handed out before ``own`` slots of an account."""
        return self._granted + sum(
            min(own, sum(ticket.slots for ticket in line))
            for other, line in self._waiting.items()
            if other != account
        )

    def _reckon(self) -> None:
        """Find those that wait without hope: room has been coming free too slowly for them."""
        for account, line in self._waiting.items():
            own = 0
            for ticket in line:
                ahead = self._before(account, own + ticket.slots) + own
                left_s = max(0.0, ticket.bound_s - ticket.waited_s)
                ticket.is_hopeless = self._seconds_for(ahead) > left_s
                own += ticket.slots

    def _seconds_for(self, slots: int) -> float:
        """Return in how many seconds so much room comes free; 0 while that is not known."""
        return slots / self._slots_per_s if self._slots_per_s else 0.0
