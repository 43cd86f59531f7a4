"""Copies: the chunks of the CPU tier that the device holds as well, where a block is to take room
once."""

from collections.abc import Callable, Iterable
from itertools import islice

from vllm_cachescope.cache.learned_order import LONG_TTL_S, LearnedOrder

ON_DEVICE = b"\0on the device"
"""The account of all blocks that the device holds, in the order of eviction from the CPU tier: they
are no candidates there. No organisation's tag is as long."""

ON_DEVICE_TTL_S = LONG_TTL_S
"""Their TTL there: only what is behind the device is kept for being marked to live longer."""


class Copies:
    """Knows which chunks are copies. They leave first, for what leaves the device.

    Args:
        on_device: whether the device holds a block, or has just evicted it.
        order: the CPU tier's order of eviction, which has the blocks of both tiers: those of the
            device belong to `ON_DEVICE`.

    Attributes:
        on_device: see there.
        order: see there.
    """

    def __init__(self, on_device: Callable[[bytes], bool], order: LearnedOrder) -> None:
        self.on_device = on_device
        self.order = order
        # The one whose block was used last at the end.
        self._keys: dict[bytes, None] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def note(self, key: bytes) -> None:
        """Note that the device holds a chunk as well, and has just used it."""
        self._keys.pop(key, None)
        self._keys[key] = None

    def discard(self, key: bytes) -> None:
        """Note that a chunk is no copy any more."""
        self._keys.pop(key, None)

    def first_to_go(self, count: int, must_stay: Callable[[bytes], bool]) -> list[bytes]:
        """Return up to ``count`` copies: what the device keeps for longest goes first.

        Args:
            count: how many.
            must_stay: whether a key may not be evicted.
        """
        free = (key for key in reversed(self._keys) if not must_stay(key))
        return list(islice(free, max(0, count)))

    def leave_order(self, keys: Iterable[bytes]) -> None:
        """Note that chunks were evicted: those that the device holds stay in the order for it."""
        stay, gone = list[bytes](), list[bytes]()
        for key in keys:
            (stay if self.on_device(key) else gone).append(key)
        self.order.reassign(stay, ON_DEVICE, is_long=False)
        self.order.remove_all(gone)
