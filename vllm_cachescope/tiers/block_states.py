"""What an engine knows of its blocks in a remote tier: enough to say why one was not there."""

import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from vllm_cachescope.cache.miss_causes import MissCause

REMEMBERED_BLOCKS = 100_000
"""How many blocks' fates are remembered for each tier: some 20 MB."""


class BlockState(Enum):
    """The last that an engine heard of a block in a tier."""

    HELD = "held"
    GONE = "gone"
    DAMAGED = "damaged"
    LATE = "late"
    CROWDED = "crowded"
    UNREAD = "unread"
    CUT = "cut"
    DROPPED = "dropped"
    REFUSED = "refused"
    UNSTORED = "unstored"


@dataclass(frozen=True, slots=True)
class Absence:
    """Why a tier did not serve a block.

    Attributes:
        cause: why.
        certain: whether the tier is known to have held the block, or to have been given it; if
            not, all that is known is that it could not be asked.
        detail: what else is known, in a few words.
    """

    cause: MissCause
    certain: bool = True
    detail: str | None = None


ABSENCES = {
    BlockState.GONE: Absence(MissCause.EVICTED),
    BlockState.DAMAGED: Absence(MissCause.EVICTED, detail="it was damaged, and deleted"),
    BlockState.LATE: Absence(MissCause.TIMED_OUT),
    BlockState.CROWDED: Absence(MissCause.TIMED_OUT, detail="too much was being loaded"),
    BlockState.UNREAD: Absence(MissCause.TIER_UNAVAILABLE),
    BlockState.CUT: Absence(MissCause.EVICTED, detail="the organisation's quota was full"),
    BlockState.DROPPED: Absence(MissCause.NEVER_STORED, detail="too much was being stored"),
    BlockState.REFUSED: Absence(MissCause.NEVER_STORED, detail="the tier refused it"),
    BlockState.UNSTORED: Absence(MissCause.NEVER_STORED, detail="the tier was down"),
}
"""What each fate but `BlockState.HELD` explains."""


class BlockStates:
    """The fates of the blocks an engine had most recently to do with. Safe for all threads."""

    def __init__(self, limit: int = REMEMBERED_BLOCKS) -> None:
        self._limit = limit
        self._fates: OrderedDict[bytes, BlockState] = OrderedDict()
        self._lock = threading.Lock()

    def note(self, keys: Iterable[bytes], fate: BlockState) -> None:
        """Note what became of ``keys``."""
        with self._lock:
            for key in keys:
                self._fates.pop(key, None)
                self._fates[key] = fate
            while len(self._fates) > self._limit:
                self._fates.popitem(last=False)

    def missed(self, keys: Iterable[bytes]) -> None:
        """Note that the tier does not hold ``keys``; of what it never held, that is nothing new."""
        with self._lock:
            for key in keys:
                if self._fates.get(key) is BlockState.HELD:
                    self._fates[key] = BlockState.GONE

    def find(self, key: bytes) -> BlockState | None:
        """Return what became of ``key``; None if nothing is known of it."""
        with self._lock:
            return self._fates.get(key)
