"""Replays recorded prompts against a hosted cache, under many ways to mark them at once.

The rules are those that Anthropic documents for Messages, which are the strictest that a client
meets:

- A prefix is written at a breakpoint, where one of at least `MIN_TOKENS` tokens ends.
- It is found by a breakpoint at its end, or up to `prompt_view.LOOKBACK` blocks behind it.
- A use refreshes all that was read, at no cost, each prefix for the lifetime that it was written
  with: a breakpoint inside of what is read lengthens nothing.
- Behind what was read, tokens are written up to the last breakpoint, each for the longest lifetime
  of the breakpoints behind it; what comes after the last one is neither.

CacheScope's own server finds a prefix at any whole block, so that it reads at least as much.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_cachescope.cli.report.prompt_view import PromptView
from vllm_cachescope.usage.record import FIVE_MINUTES_S

MIN_TOKENS = 1024
"""Tokens of the shortest prefix that is cached, as Anthropic has it for most models."""

Floats = NDArray[np.float32]
"""One number for each way to mark the prompts."""

_MAX_ENTRIES = 2**15


@dataclass(frozen=True, slots=True)
class Tokens:
    """What becomes of the tokens of one prompt, or of many, under each way to mark them.

    Attributes:
        read: tokens read.
        short: tokens written to live for five minutes, or less.
        long: tokens written to live for longer.
        uncached: all others.
    """

    read: NDArray[np.float64]
    short: NDArray[np.float64]
    long: NDArray[np.float64]
    uncached: NDArray[np.float64]

    @classmethod
    def none(cls, ways: int) -> "Tokens":
        """Return no tokens, for so many ways to mark prompts."""
        return cls(*(np.zeros(ways) for _ in range(4)))

    def add(self, other: "Tokens") -> None:
        """Add those of another prompt."""
        self.read[:] += other.read
        self.short[:] += other.short
        self.long[:] += other.long
        self.uncached[:] += other.uncached


class CostReplay:
    """The caches of several ways to mark the same prompts, side by side.

    Args:
        ways: how many.
        min_tokens: tokens of the shortest prefix that is cached.
        entries: how many prefixes are kept; the least recently used are forgotten first.
    """

    def __init__(
        self, ways: int, min_tokens: int = MIN_TOKENS, entries: int = _MAX_ENTRIES
    ) -> None:
        self._ways = ways
        self._min_tokens = min_tokens
        # A row for each prefix: until when it lives under each way, and for how long from a use on.
        self._until: Floats = np.empty((entries, ways), np.float32)
        self._ttl: Floats = np.empty((entries, ways), np.float32)
        self._row_of: OrderedDict[int, int] = OrderedDict()
        self._free = list(range(entries))
        self._began: float | None = None

    def use(self, at: float, view: PromptView, marks: Sequence[tuple[int, Floats]]) -> Tokens:
        """Record a prompt, and return what becomes of its tokens.

        Args:
            at: when it was sent, in seconds; not before the prompt recorded last.
            view: the prompt.
            marks: the breakpoints, as ``(block, TTLs)``: under each way to mark it the TTL in
                seconds, 0 where it sets none there.
        """
        self._began = at if self._began is None else self._began
        now = np.float32(at - self._began)
        by_block: dict[int, Floats] = {}
        for block, ttls in sorted(marks, key=lambda one: one[0]):
            if view.ends[block] >= self._min_tokens:
                known = by_block.get(block)
                by_block[block] = ttls if known is None else np.maximum(known, ttls)
        total = view.tokens
        if not by_block:
            return _all_uncached(total, self._ways)
        blocks = list(by_block)
        ttls = np.stack(list(by_block.values()))
        used = ttls > 0
        read = self._read(now, view, blocks, used)
        ends = np.array([view.ends[block] for block in blocks], np.float32)[:, None]
        self._write(now, view, blocks, np.where(ends > read, ttls, 0))

        reached = np.maximum.accumulate(np.where(used, ends, 0), axis=0)
        before = np.maximum(read, np.vstack([np.zeros_like(read)[None], reached[:-1]]))
        written = np.where(used, np.maximum(0, ends - before), 0)
        lives = np.maximum.accumulate(ttls[::-1], axis=0)[::-1]
        long = np.where(lives > FIVE_MINUTES_S, written, 0).sum(axis=0)
        short = written.sum(axis=0) - long
        rest = total - read - short - long
        return Tokens(*(one.astype(np.float64) for one in (read, short, long, rest)))

    def _read(
        self, now: np.float32, view: PromptView, blocks: Sequence[int], used: NDArray[np.bool_]
    ) -> Floats:
        """Return how many tokens are read, and refresh what they belong to."""
        back = len(view.keys) if view.lookback is None else view.lookback
        found: list[int] = []
        rows: list[int] = []
        for i in {i for mark in blocks for i in range(max(0, mark - back), mark + 1)}:
            row = self._row_of.get(view.keys[i])
            if row is not None:
                found.append(i)
                rows.append(row)
                self._row_of.move_to_end(view.keys[i])
        if not found:
            return np.zeros(self._ways, np.float32)
        at, marks = np.array(found)[:, None], np.array(blocks)[None]
        near = ((at <= marks) & (at >= marks - back)).astype(np.float32)
        seen = near @ used.astype(np.float32) > 0
        ends = np.array([view.ends[i] for i in found], np.float32)[:, None]
        until, ttl = self._until[rows], self._ttl[rows]
        live = until >= now
        read: Floats = np.where(live & seen, ends, 0).max(axis=0)
        self._until[rows] = np.where(live & (ends <= read), np.maximum(until, now + ttl), until)
        return read

    def _write(
        self, now: np.float32, view: PromptView, blocks: Sequence[int], ttls: Floats
    ) -> None:
        """Write prefixes with their TTLs; 0 where one is not written."""
        rows = [self._row(view.keys[block]) for block in blocks]
        until, ttl = self._until[rows], self._ttl[rows]
        kept = np.where(until >= now, np.maximum(ttl, ttls), ttls)
        used = ttls > 0
        self._until[rows] = np.where(used, np.maximum(until, now + kept), until)
        self._ttl[rows] = np.where(used, kept, ttl)

    def _row(self, key: int) -> int:
        row = self._row_of.get(key)
        if row is None:
            if not self._free:
                self._free.append(self._row_of.popitem(last=False)[1])
            row = self._row_of[key] = self._free.pop()
            self._until[row] = -np.inf
            self._ttl[row] = 0
        else:
            self._row_of.move_to_end(key)
        return row


def _all_uncached(tokens: int, ways: int) -> Tokens:
    none = Tokens.none(ways)
    none.uncached[:] = tokens
    return none
