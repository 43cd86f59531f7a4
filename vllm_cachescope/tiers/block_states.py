"""The states of an engine's blocks in a remote tier, which explain why a block was missed."""

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from cachetools import FIFOCache

from vllm_cachescope.cache.miss_causes import MissCause
from vllm_cachescope.tiers.inventory import Inventory

REMEMBERED_BLOCKS = 100_000
"""How many blocks' states are remembered for each tier: some 20 MB."""


class BlockState(Enum):
    """The last that an engine heard of a block in a tier.

    Attributes:
        HELD: the store holds it.
        GONE: the store held it and does not any more: it has expired, or the store evicted it.
        PURGED: it was purged there.
        DAMAGED: what the store held was damaged or forged, and was dropped there.
        LATE: it was found, and did not arrive by the load's deadline.
        CROWDED: it was found, and too much was being loaded already.
        UNREAD: it was found, and the store failed before it could be read.
        CUT: it was evicted, or not stored, because its organisation's quota was full.
        DROPPED: it was not stored, because too much was being stored already.
        REFUSED: it was not stored, because the store refused writes.
        UNSTORED: it was not stored, because the store was down or the block was purged.
    """

    HELD = "held"
    GONE = "gone"
    PURGED = "purged"
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
        cause: why, in the terms of the diagnosis.
        certain: whether the tier is known to have held the block, or to have been given it to
            store. If not, all that is known is that the tier could not be asked.
        detail: what else is known, in a few words: "the tier refused it".
    """

    cause: MissCause
    certain: bool = True
    detail: str | None = None


ABSENCES = {
    BlockState.GONE: Absence(MissCause.EVICTED),
    BlockState.PURGED: Absence(MissCause.EVICTED, detail="it was purged"),
    BlockState.DAMAGED: Absence(MissCause.EVICTED, detail="it was damaged or forged, and deleted"),
    BlockState.LATE: Absence(MissCause.TIMED_OUT),
    BlockState.CROWDED: Absence(MissCause.TIMED_OUT, detail="too much was being loaded"),
    BlockState.UNREAD: Absence(MissCause.TIER_UNAVAILABLE),
    BlockState.CUT: Absence(MissCause.EVICTED, detail="the organisation's quota was full"),
    BlockState.DROPPED: Absence(MissCause.NEVER_STORED, detail="too much was being stored"),
    BlockState.REFUSED: Absence(MissCause.NEVER_STORED, detail="the tier refused it"),
    BlockState.UNSTORED: Absence(MissCause.NEVER_STORED, detail="the tier was down"),
}
"""The absence that each state but `BlockState.HELD` explains."""

_ABSENT = (BlockState.GONE, BlockState.DAMAGED, BlockState.CUT)
"""The states of blocks that the store does not hold."""


class BlockStates:
    """The states of the blocks that an engine heard of most recently. Safe for several threads.

    Args:
        inventory: is told which blocks the store does not hold; None if nobody asks.
        limit: how many blocks are remembered.
    """

    def __init__(self, inventory: Inventory | None = None, limit: int = REMEMBERED_BLOCKS) -> None:
        self._inventory = inventory
        self._states: FIFOCache[bytes, BlockState] = FIFOCache(limit)
        self._lock = threading.Lock()

    def note(self, keys: Iterable[bytes], state: BlockState) -> None:
        """Note the state that ``keys`` are in now."""
        keys = list(keys)
        if self._inventory is not None and state in _ABSENT:
            self._inventory.gone(keys)
        with self._lock:
            for key in keys:
                self._states[key] = state

    def missed(self, keys: Iterable[bytes]) -> None:
        """Note that the store does not hold ``keys``.

        Blocks that it held become `BlockState.GONE`. The others keep their state, which explains
        the miss better: `BlockState.DROPPED`, say, tells that a block was never stored.
        """
        keys = list(keys)
        if self._inventory is not None:
            self._inventory.gone(keys)
        with self._lock:
            for key in keys:
                if self._states.get(key) is BlockState.HELD:
                    self._states[key] = BlockState.GONE

    def purged(self, prefix: bytes) -> None:
        """Note that the store holds nothing more whose owner begins with ``prefix``.

        The scheduler's thread takes the lock, too: it is not held while all keys are looked at.
        """
        with self._lock:
            known = list(self._states.items())
        for key, state in known:
            if state is BlockState.HELD and key.startswith(prefix):
                with self._lock:
                    if self._states.get(key) is BlockState.HELD:
                        self._states[key] = BlockState.PURGED

    def find(self, key: bytes) -> BlockState | None:
        """Return the state of ``key``; None if nothing is known of it."""
        with self._lock:
            return self._states.get(key)
