"""The purges of a fleet: those that this engine has others carry out, and those that it carries out
for them. A thread of its own reads the store's purge log and writes to it.

A purge is announced, and each engine that follows the log purges its device and its CPU tier, has
its running prompts leave nothing behind, and deletes what may have been stored meanwhile. Only then
it says that it is done.
"""

import secrets
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from cachetools import FIFOCache

from vllm_cachescope.logs import logger_of
from vllm_cachescope.tiers.context import TierContext
from vllm_cachescope.tiers.jobs import Purge
from vllm_cachescope.tiers.joining import join
from vllm_cachescope.tiers.purge_log import PurgeLog
from vllm_cachescope.tiers.purge_notices import Progress, PurgeNotice, PurgeNotices
from vllm_cachescope.tiers.store import Store, StoreFailed

FOLLOW_S = 0.5
"""How often the log is read, in seconds."""

LATE_S = 4 * FOLLOW_S
"""How old what was read last may be, in seconds, before a request waits for the next reading."""

LIVE_S = 10.0
"""How long an engine that is not heard of counts as one that runs, in seconds."""

GIVE_UP = 2
"""After so many failures in a row no request waits for the log any more. What was under way when
this process stood still has failed for that alone."""

CONFIRM_S = 5.0
"""How long a purge waits for other engines to say that they are done, in seconds."""

ASK_S = 0.02
"""How often others are looked for while a purge waits for them, in seconds."""

KNOWN = 10_000
"""Purges of its own that an engine recognises in the log: the latest ones."""

_NOWHERE = 2**53 - 1
"""A position behind everything."""

logger = logger_of(__name__)


@dataclass(slots=True, eq=False)
class Announcement:
    """A purge that others are to carry out as well.

    Attributes:
        notice: which purge.
        deadline: until when it waits for others, on the tier's clock, in seconds.
        position: where it stands in the log; None while it does not.
        confirmed: the names of the engines that have carried it out.
        missing: by the names of those that may not have, why that is not known.
        over: whether it is over. The thread writes the other fields before it sets this.
    """

    notice: PurgeNotice
    deadline: float
    position: int | None = None
    confirmed: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    over: bool = False


@dataclass(frozen=True, slots=True)
class Errand:
    """A purge that this engine is to carry out for another one.

    Attributes:
        position: where it stands in the log.
        notice: which purge.
        at_home: whether it concerns the device and the CPU tier only.
    """

    position: int
    notice: PurgeNotice
    at_home: bool = False


class FleetPurges:
    """The purges of all engines on one store.

    `announce`, `take`, `carried_out` and `is_late` are called on the scheduler's thread and do not
    wait for the store.

    Args:
        tier: the tier's context.
        notices: seals and opens what stands in the log.
        name: what an operator knows this engine by.
    """

    def __init__(self, tier: TierContext, notices: PurgeNotices, name: str) -> None:
        self.name = name
        self._tier = tier
        self._notices = notices
        self._id = secrets.token_hex(8).encode()
        self._began_at = tier.clock()
        self._work = threading.Condition()
        # Under the lock of `_work`.
        self._announced: list[Announcement] = []
        self._errands: deque[Errand] = deque()
        # By position; None until the scheduler has done its part.
        self._under_way: dict[int, Sequence[Purge] | None] = {}
        self._stopping = False
        # The thread writes these, the scheduler's reads them.
        self._own: FIFOCache[str, None] = FIFOCache(KNOWN)
        self._read_at = tier.clock()
        self._failures = 0
        self._position: int | None = None
        self._listed_at = tier.clock()
        self._thread = threading.Thread(
            target=self._run, name=f"cachescope-{tier.name}-fleet", daemon=True
        )

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def announce(self, notice: PurgeNotice) -> Announcement:
        """Have all other engines on the store carry out a purge. This one does so by itself."""
        announcement = Announcement(notice, self._tier.clock() + CONFIRM_S)
        with self._work:
            self._own[notice.purge_id] = None
            self._announced.append(announcement)
            self._work.notify()
        return announcement

    @property
    def has_errands(self) -> bool:
        """Whether there is something for this engine to carry out."""
        return bool(self._errands)

    def take(self) -> Sequence[Errand]:
        """Return what this engine is to carry out now, in order; `carried_out` ends each."""
        if not self._errands:
            return ()
        with self._work:
            errands = list(self._errands)
            self._errands.clear()
            self._under_way |= {errand.position: None for errand in errands}
        return errands

    def carried_out(self, errand: Errand, purges: Sequence[Purge]) -> None:
        """Note that an errand is done but for purges of stores that are under way."""
        with self._work:
            self._under_way[errand.position] = purges
            self._work.notify()

    def is_late(self) -> bool:
        """Whether the log is about to be read that should have been read long ago: this process
        stood still, say. What it holds may have been purged meanwhile."""
        is_readable = self._failures < GIVE_UP
        return is_readable and self._tier.clock() - self._read_at > LATE_S

    @property
    def follows(self) -> bool:
        """Whether it has read the log."""
        return self._position is not None

    def wake(self) -> None:
        """Have the thread read the log now. Called on any thread."""
        with self._work:
            self._failures = 0
            self._work.notify()

    def stop(self) -> None:
        """Have the thread end; `join` waits for that."""
        with self._work:
            self._stopping = True
            self._work.notify()

    def join(self, deadline: float) -> None:
        """Wait until the thread has ended, or for the deadline on the tier's clock."""
        join([self._thread], deadline, self._tier.clock)

    # The thread.

    def _run(self) -> None:
        store = self._tier.new_store()
        log = store.purge_log()
        assert log is not None
        while True:
            with self._work:
                if not self._stopping:
                    is_busy = self._announced or self._under_way or 0 < self._failures < GIVE_UP
                    self._work.wait(ASK_S if is_busy else FOLLOW_S)
                if self._stopping:
                    break
            self._turn(store, log)
        for announcement in self._announced:
            self._end(announcement, "the engine is going down")
        store.close()

    def _turn(self, store: Store, log: PurgeLog) -> None:
        """Read the log, write what is to be written, and see how far others have come."""
        availability, reason = self._tier.availability, None
        if not availability.usable:
            reason = availability.reason or "it has not answered yet"
        else:
            try:
                if not store.alive():
                    store.connect(self._tier.timeout_at())
                self._follow(log)
                self._speak(log)
            except StoreFailed as error:
                reason = str(error)
            except Exception as error:
                logger.exception("Tier %s: the purge log cannot be followed", self._tier.name)
                store.close()
                reason = str(error)
        if reason is None:
            return
        self._failures += 1
        if self._failures == GIVE_UP and availability.usable:
            logger.warning(
                "Tier %s: what other engines purge does not reach this one: %s",
                self._tier.name,
                reason,
            )
        for announcement in list(self._announced):
            if self._failures >= GIVE_UP or self._tier.clock() > announcement.deadline:
                self._end(announcement, reason)

    def _follow(self, log: PurgeLog) -> None:
        deadline = self._tier.timeout_at()
        if self._position is None:
            news = log.follow(self._id, self._claim(0), _NOWHERE, deadline)
            # What was purged before this engine began, it has never held.
            ran_us = int((self._tier.clock() - self._began_at) * 1e6)
            self._position = news.now - ran_us
            self._listed_at = self._tier.clock()
        news = log.follow(self._id, self._claim(self._done()), self._position, deadline)
        if news.is_new:
            self._listed_at = self._tier.clock()
        errands = []
        if self._position < news.complete_from:
            logger.warning(
                "Tier %s: this engine was away for too long to know what was purged meanwhile, and "
                "drops all that it holds",
                self._tier.name,
            )
            errands.append(Errand(news.complete_from, PurgeNotice("", b""), at_home=True))
            self._position = news.complete_from
        for position, entry in news.entries:
            notice = self._notices.open(entry)
            if notice is not None and notice.purge_id not in self._own:
                errands.append(Errand(position, notice))
            self._position = position
        with self._work:
            self._errands += errands
        self._read_at = self._tier.clock()
        self._failures = 0

    def _done(self) -> int:
        """Return up to where everything is carried out."""
        with self._work:
            for position, purges in list(self._under_way.items()):
                if purges is not None and all(purge.over for purge in purges):
                    del self._under_way[position]
            waiting = [*self._under_way, *(errand.position for errand in self._errands)]
        return min(waiting) - 1 if waiting else self._position or 0

    def _claim(self, position: int) -> bytes:
        return self._notices.claim(self._id, Progress(self.name, position))

    def _speak(self, log: PurgeLog) -> None:
        with self._work:
            announced = list(self._announced)
        if not announced:
            return
        deadline = self._tier.timeout_at()
        for announcement in announced:
            if announcement.position is None:
                sealed = self._notices.seal(announcement.notice)
                announcement.position = log.announce(sealed, deadline)
        others = [
            (progress, follower.idle_s)
            for follower in log.followers(deadline)
            if follower.follower_id != self._id and follower.idle_s < LIVE_S
            if (progress := self._notices.progress(follower.follower_id, follower.claim))
        ]
        for announcement in announced:
            position = announcement.position
            assert position is not None
            waits = [(other, idle_s) for other, idle_s in others if other.position < position]
            # A list that is new, or was lost, does not have all engines yet.
            is_known = self._tier.clock() > self._listed_at + 2 * FOLLOW_S
            if (waits or not is_known) and self._tier.clock() < announcement.deadline:
                continue
            announcement.confirmed = sorted(o.name for o, _ in others if o.position >= position)
            announcement.missing = {
                other.name: f"it has not said within {CONFIRM_S:g} s that it is done; it was last "
                f"heard of {idle_s:.1f} s ago, and purges before it serves anyone again"
                for other, idle_s in waits
            }
            self._end(announcement)

    def _end(self, announcement: Announcement, reason: str | None = None) -> None:
        if reason is not None:
            announcement.missing = {"other replicas": f"they could not be told: {reason}"}
        with self._work:
            self._announced.remove(announcement)
        announcement.over = True
