"""Copies: the chunks of the CPU tier that the device holds as well, where a block is to take room
once."""

from collections.abc import Callable, Iterable, Sequence
from itertools import islice, takewhile

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

    def worth_keeping(
        self,
        keys: Sequence[bytes],
        free: int,
        now: float,
        must_stay: Callable[[bytes], bool],
        is_long: Callable[[bytes], bool],
    ) -> list[bytes]:
        """Return those of ``keys``, which the device has just evicted, that earn more than what
        would leave for them, the best first.

        Args:
            keys: in prompt order.
            free: how many chunks are free.
            now: the time in seconds.
            must_stay: whether a key may not be evicted.
            is_long: whether a block was marked to live longer: those are kept first within their
                share.
        """
        order = self.order
        # The sort is stable: of what is worth the same the beginning of a prompt comes first.
        known = sorted(filter(order.runs.__contains__, keys), key=order.rank_of, reverse=True)
        copies = set(self.first_to_go(len(keys) - free, must_stay))
        free += len(copies)
        # What it knows nothing of comes last, and in nothing's place.
        unknown = [key for key in keys if key not in order.runs]
        chosen, rest = (known + unknown)[:free], known[free:]
        if not rest:
            return chosen
        claims = list(filter(is_long, rest))[: max(0, order.long_blocks - order.long_held)]
        claimed = set(claims)
        victims = order.victims_up_to(len(rest), now, lambda key: key in copies or must_stay(key))
        others = (key for key in rest if key not in claimed)
        better = takewhile(
            lambda pair: order.rank_of(pair[0]) > order.rank_of(pair[1]),
            zip(others, victims[len(claims) :], strict=False),
        )
        return [*chosen, *claims, *(key for key, _ in better)]

    def leave_order(self, keys: Iterable[bytes]) -> None:
        """Note that chunks were evicted: those that the device holds stay in the order for it."""
        stay, gone = list[bytes](), list[bytes]()
        for key in keys:
            (stay if self.on_device(key) else gone).append(key)
        self.order.reassign(stay, ON_DEVICE, is_long=False)
        self.order.remove_all(gone)
