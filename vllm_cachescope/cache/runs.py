"""Runs: blocks of one prompt that were last used together, and what is known of them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from vllm_cachescope.cache.return_counts import Kind

if TYPE_CHECKING:
    from vllm_cachescope.cache.run_place import Place

UNKNOWN = -1


class Group(IntEnum):
    """What sort of blocks a run has; the first part of its kind."""

    CONVERSATION = 0  # what only one conversation has used so far
    SHARED = 1  # what prompts with different ends have begun with
    PARTIAL = 2  # a last block that is not full: a longer prompt has another in its place


class Ended(IntEnum):
    """How the answer to a request ended."""

    ANSWER = 0  # the turn is over: whoever asked may ask again, or never
    TOOLS = 1  # it waits for the results of tools, which come with the session's next request
    OVER = 2  # nothing goes on from it: its history was replaced, or whoever asked has its answer


@dataclass(frozen=True, slots=True)
class RequestSignals:
    """What a request tells of its blocks' future.

    Attributes:
        ended: how its answer ended; None if that is not known, or not yet.
        output_tokens: how many tokens were generated; None if that is not known.
        ends_partial: whether the last block is not full. Engines cache no such blocks; traces may
            have them.
    """

    output_tokens: int | None = None
    ends_partial: bool = False
    ended: Ended | None = None


NO_SIGNALS = RequestSignals()


class Whole:
    """What a prompt's runs of one kind are together: those of several places, say.

    Attributes:
        size: the sizes of its runs.
    """

    __slots__ = ("size",)

    def __init__(self) -> None:
        self.size = 0


class Run:
    """Consecutive blocks of one prompt, of one kind and place.

    Attributes:
        keys: its blocks in prompt order. Those that went elsewhere meanwhile are still listed.
        live: how many of them are resident and belong to this run still.
        size: how many belonged to it, resident or not, and were not used again.
        whole: what it is a part of; `resize` changes the size of both.
        cell: its kind and the bin of its age; see `ReturnCounts`.
        used_at: when it was last used, in seconds.
        turn: how many requests of the same conversation came before the one that used it.
        is_shared: whether prompts part behind it.
        is_open: whether the request that stores it is not over: what uses it then is that request.
        place: the place it is in; None once no block of it is left.
        beside: what was a part of it, and is in another place now; None if nothing is.
    """

    __slots__ = (
        "beside",
        "cell",
        "first",
        "is_open",
        "is_shared",
        "keys",
        "live",
        "place",
        "size",
        "turn",
        "used_at",
        "whole",
    )

    def __init__(
        self,
        keys: list[bytes],
        cell: int,
        used_at: float,
        turn: int,
        is_shared: bool,
        whole: Whole | None = None,
    ) -> None:
        self.keys = keys
        self.first: bytes | None = keys[0] if keys else None
        self.live = 0
        self.size = 0
        self.whole = Whole() if whole is None else whole
        self.resize(len(keys))
        self.cell = cell
        self.used_at = used_at
        self.turn = turn
        self.is_shared = is_shared
        self.is_open = False
        self.place: Place | None = None
        self.beside: Run | None = None

    def resize(self, size: int) -> None:
        """Set ``size``, and with it that of the whole."""
        self.whole.size += size - self.size
        self.size = size


class Stretch(NamedTuple):
    """Consecutive blocks of a prompt that were in one run before, or in none.

    Attributes:
        run: that run, resident or not; None for blocks that are new, or forgotten.
        start: where they begin, in blocks from the start of the prompt.
        end: where they end.
    """

    run: Run | None
    start: int
    end: int


def stretches(
    keys: list[bytes],
    resident: Mapping[bytes, Run],
    evicted: Mapping[bytes, Run],
    touched: Mapping[bytes, Run],
) -> Iterator[Stretch]:
    """Yield where the blocks of a prompt were before, in prompt order.

    Args:
        keys: the blocks of the prompt.
        resident: the run of each block that is there.
        evicted: the runs of which nothing is there, by their first block.
        touched: where blocks were before requests used them that are not over.
    """
    current: Run | None = None
    start = covered = i = 0
    length, looked_ahead = len(keys), False
    while i < length:
        key = keys[i]
        run = resident.get(key)
        if run is not None and run.is_open:
            run = touched.get(key)
        if run is current and run is not None:
            i += 1
            continue
        if run is None:
            if current is not None and i < covered:
                i += 1  # Of a run that is known, a block that was evicted, or stored once more.
                continue
            run = evicted.get(key)
        if run is current:
            if not looked_ahead and i + 1 < length:
                # Mostly all that follows what is new is new, which is seen at once.
                rest, looked_ahead = keys[i:], True
                if resident.keys().isdisjoint(rest) and evicted.keys().isdisjoint(rest):
                    break
            i += 1
            continue
        if i > start:
            yield Stretch(current, start, i)
        current, start = run, i
        covered = i + run.size if run is not None else i
        # Mostly a run is used again as a whole.
        blocks = 1 if run is None else len(run.keys)
        if run is not None and run.live == blocks > 1 and run.keys == keys[i : i + blocks]:
            i += blocks
        else:
            i += 1
    if length > start:
        yield Stretch(current, start, length)


def octave(number: float) -> int:
    """Return the level of a count or a time: 0 for less than 1, then one more for each doubling."""
    return max(0, int(number)).bit_length()


def conversation_kind(turn: int, new_blocks: int, signals: RequestSignals) -> Kind:
    """Return the kind of a conversation's blocks.

    Levels are coarse on purpose: each must be seen some ten times before it says anything.

    Args:
        turn: requests of the conversation before this one.
        new_blocks: blocks that it added.
        signals: what else is known.
    """
    output = UNKNOWN if signals.output_tokens is None else octave(signals.output_tokens) // 2
    return (
        Group.CONVERSATION,
        min(octave(turn), 3),
        min(octave(new_blocks), 7),
        output,
        UNKNOWN if signals.ended is None else int(signals.ended),
    )


OPEN_KIND: Kind = (Group.CONVERSATION, *(UNKNOWN,) * 4)
"""Of what a request has stored that is not over."""

PARTIAL_KIND: Kind = (Group.PARTIAL,)

KIND_LENGTHS: Mapping[int, int] = {
    Group.CONVERSATION: len(OPEN_KIND),
    Group.SHARED: 2,
    Group.PARTIAL: len(PARTIAL_KIND),
}
"""How many numbers a kind of each group has. What was learned with other features says nothing of
these."""


def shared_kind(gap_s: float) -> Kind:
    """Return the kind of blocks that prompts part behind.

    Args:
        gap_s: how long they had not been used, in seconds.
    """
    return (Group.SHARED, octave(gap_s))
