"""The purge log of a store: purges that every engine on the store is to carry out, and how far each
of them has come.

A position in the log is the store's own time, in µs: it grows with each entry, and an engine that
was away knows from when on it has to read.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

RETENTION_S = 7 * 24 * 3600
"""How long an entry stays in the log, in seconds. An engine that was away for longer drops all that
it holds itself."""

MAX_ENTRIES = 100_000
"""Entries that the log holds; the oldest go first, as if their time were over."""


AT_ONCE = 1000
"""Entries that a follower reads at once."""


@dataclass(frozen=True, slots=True)
class Follower:
    """An engine that follows the log.

    Attributes:
        follower_id: unlike that of any other.
        claim: what it left there when it was last heard of.
        idle_s: how long ago that was, in seconds.
    """

    follower_id: bytes
    claim: bytes
    idle_s: float


@dataclass(frozen=True, slots=True)
class News:
    """What a follower reads in the log.

    Attributes:
        now: the position of the present.
        complete_from: the log has all entries behind this position.
        is_new: whether the follower was not listed: it is new, or the list was lost.
        entries: the first `AT_ONCE` entries behind the position that was asked for, each with its
            own, in order.
    """

    now: int
    complete_from: int
    is_new: bool
    entries: Sequence[tuple[int, bytes]]


class PurgeLog(ABC):
    """One thread's way to the log. Deadlines are on the tier's clock, in seconds.

    All methods raise `StoreFailed` if the store does not answer, or refuses.
    """

    @abstractmethod
    def announce(self, entry: bytes, deadline: float) -> int:
        """Append an entry, unless it is there already; return its position."""

    @abstractmethod
    def follow(self, follower_id: bytes, claim: bytes, since: int, deadline: float) -> News:
        """Read what stands behind a position, and leave a claim.

        Args:
            follower_id: of whom.
            claim: what others are to read of it, until it comes again.
            since: the position behind which to read.
            deadline: until when an answer is waited for.
        """

    @abstractmethod
    def followers(self, deadline: float) -> list[Follower]:
        """Return who follows the log, with those who have gone lately."""
