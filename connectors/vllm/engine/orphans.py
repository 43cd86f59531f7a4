"""The orphans of the CPU tier: chunks of which routers are not told yet, since no tier of this
engine has what stands in front of them.

Routers keep indexes of prefixes. What comes into the CPU tier without its beginning is of no use to
any prompt, and an index drops it (llm-d's) or finds it by none; told too early it would be missing
there once its beginning is back. That happens where the device evicts the beginning while the rest
is being loaded from a remote tier.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from msgspec.structs import replace
from vllm.distributed.kv_events import MEDIUM_CPU, BlockRemoved, BlockStored, KVCacheEvent

Name = tuple[int | None, Any]
"""A chunk's group and the hash of its last block, as events have them."""


@dataclass(frozen=True, slots=True)
class Front:
    """What stands in front of a chunk.

    Attributes:
        key: of the chunk there; None at the beginning of a prompt.
        name: its group and its hash, as events have them.
    """

    key: bytes | None
    name: Name | None


_BEGINNING = Front(None, None)

LOOKS = 64
"""At how many orphans a step looks whose beginning may be back on the device or in a remote tier:
no step takes longer, however many there are. What waits for a chunk of the CPU tier is found by
that."""


@dataclass(frozen=True, slots=True)
class _Orphan:
    event: BlockStored
    front: Front


class Orphans:
    """Holds back what is stored in the CPU tier until what stands in front of it is told.

    Args:
        on_device: whether the device holds a chunk, by its key.
        elsewhere: whether a remote tier was said to hold a chunk, by its key.
    """

    def __init__(
        self, on_device: Callable[[bytes], bool], elsewhere: Callable[[bytes], bool]
    ) -> None:
        self._on_device, self._elsewhere = on_device, elsewhere
        # Of what was stored since events were told last.
        self._fronts: dict[Name, Front] = {}
        # What routers know of the CPU tier.
        self._told: set[Name] = set()
        # The one that was looked at last is the last.
        self._orphans: dict[Name, _Orphan] = {}
        # By what stands in front of them.
        self._behind: defaultdict[Name | None, set[Name]] = defaultdict(set)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._orphans)

    def note(self, name: Name, front: Front) -> None:
        """Note what stands in front of a chunk that is stored."""
        self._fronts[name] = front

    def forget(self) -> None:
        """Forget all: everything is told anew."""
        self._told.clear()
        self._orphans.clear()
        self._behind.clear()

    def told(self, events: Iterable[KVCacheEvent]) -> list[KVCacheEvent]:
        """Return what routers are told of a step's events, behind those of the device."""
        told: list[KVCacheEvent] = []
        stored: list[Name] = []
        for event in events:
            if isinstance(event, BlockStored) and event.medium == MEDIUM_CPU:
                name = event.group_idx, event.block_hashes[-1]
                front = self._fronts.get(name, _BEGINNING)
                if self._follows(front):
                    self._told.add(name)
                    stored.append(name)
                    told.append(event)
                else:
                    self._orphans[name] = _Orphan(event, front)
                    self._behind[front.name].add(name)
            elif isinstance(event, BlockRemoved) and event.medium == MEDIUM_CPU:
                if hashes := self._told_before(event):
                    told.append(replace(event, block_hashes=hashes))
            else:
                told.append(event)
        self._fronts.clear()
        return [*told, *self._released(stored)] if self._orphans else told

    def _follows(self, front: Front) -> bool:
        return front.key is None or front.name in self._told or self._on_device(front.key)

    def _told_before(self, event: BlockRemoved) -> list[Any]:
        """Return what of a removal routers know; the rest they were never told of."""
        unknown: set[Any] = set()
        for block_hash in event.block_hashes:
            name = event.group_idx, block_hash
            self._told.discard(name)
            if (orphan := self._pop(name)) is not None:
                unknown.update(orphan.event.block_hashes)
        return [name for name in event.block_hashes if name not in unknown]

    def _released(self, stored: Iterable[Name]) -> Iterator[KVCacheEvent]:
        """Yield those that are orphans no longer.

        Args:
            stored: what routers were just told of.
        """
        looked = list(islice(self._orphans, LOOKS))
        free = deque(name for name in looked if self._is_free(self._orphans[name].front))
        for name in looked:
            self._orphans[name] = self._orphans.pop(name)
        for front in stored:
            free += self._behind.get(front, ())
        while free:
            name = free.popleft()
            if (orphan := self._pop(name)) is not None:
                self._told.add(name)
                yield orphan.event
                free += self._behind.get(name, ())

    def _pop(self, name: Name) -> _Orphan | None:
        orphan = self._orphans.pop(name, None)
        if orphan is not None:
            behind = self._behind[orphan.front.name]
            behind.discard(name)
            if not behind:
                del self._behind[orphan.front.name]
        return orphan

    def _is_free(self, front: Front) -> bool:
        # By now everything else is told, what remote tiers hold as well.
        return self._follows(front) or (front.key is not None and self._elsewhere(front.key))
