"""The learned order of eviction: what is least likely to be used again soon goes first."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import repeat
from math import inf, nextafter
from typing import Any

from vllm_cachescope.cache.gone_runs import GoneRuns
from vllm_cachescope.cache.places import Places
from vllm_cachescope.cache.price_fits import PriceFits
from vllm_cachescope.cache.prompt_parts import parts_of
from vllm_cachescope.cache.return_counts import BINS, OVER, Counted, Kind, ReturnCounts
from vllm_cachescope.cache.return_prices import Prices
from vllm_cachescope.cache.run_ages import RunAges
from vllm_cachescope.cache.run_place import Place
from vllm_cachescope.cache.run_selection import RunSelection
from vllm_cachescope.cache.runs import (
    KIND_LENGTHS,
    NO_SIGNALS,
    OPEN_KIND,
    Ended,
    Group,
    RequestSignals,
    Run,
    Stretch,
    Whole,
    stretches,
)

Piece = tuple[Sequence[bytes], int, bytes]
"""Consecutive blocks of a prompt with one TTL in seconds and one organisation's tag."""

LONG_TTL_S = 300
"""A longer lifetime than this, the shortest that clients can ask for, is a claim to be kept."""

_TOGETHER_S = 0.1
"""Blocks that are stored so close to one another are used together until their request is over."""


class LearnedOrder:
    """Evicts the block whose place earns the fewest hits, by what it has seen of such blocks.

    `ReturnCounts` says how it learns, `fit_prices` what a block is worth, and docs/policy.md why.

    Blocks marked to live longer are kept before all others while they are at most a share of the
    tier; what exceeds it competes by price. An organisation that holds no more blocks than its
    reserve is spared: its blocks are evicted only when there are no others.

    A block costs O(log cells) amortised, and a bounded number of steps beyond that for its request.

    Args:
        reserve: returns how many blocks of an organisation are spared, by its tag.
        long_blocks: how many blocks that are marked to live longer are kept first.
        compute: runs a fit, given as a function without arguments, now or on another thread.
        on_fit: gets the counts that a fit was made from, now and then, where the fit runs.
    """

    def __init__(
        self,
        reserve: Callable[[bytes], int] = lambda org: 0,
        long_blocks: int = 0,
        compute: Callable[[Callable[[], None]], object] = lambda fit: fit(),
        on_fit: Callable[[Counted], None] = lambda counted: None,
    ) -> None:
        self.long_blocks = long_blocks
        self.places = Places(reserve)
        self._counts = ReturnCounts()
        self._fits = PriceFits(self._counts, compute, on_fit)
        self._run_of: dict[bytes, Run] = {}
        # Where blocks were before requests used them that are not over.
        self._touched: dict[bytes, Run] = {}
        self._gone = GoneRuns(self._counts)
        self._ages = RunAges(self._counts, self.places.lower)
        self._used_at = -inf
        self._open: Run | None = None

    def __len__(self) -> int:
        return len(self._run_of)

    def held(self, org: bytes) -> int:
        """Return how many blocks of ``org`` there are."""
        return self.places.accounts.get(org, 0)

    @property
    def accounts(self) -> Mapping[bytes, int]:
        """How many blocks each organisation has."""
        return self.places.accounts

    @property
    def long_held(self) -> int:
        """How many blocks there are that were marked to live longer."""
        return self.places.long_held

    # Uses.

    def use(self, key: bytes, ttl_s: int, now: float, org: bytes = b"") -> None:
        """Add ``key``, or note that it was used at ``now`` (seconds, never running backwards).

        To be called for blocks of requests that are not over; `use_request` tells what they were.
        """
        self._ages.advance(now, self._fits.prices)
        place = self.places.make(org, ttl_s > LONG_TTL_S)
        run = self._open
        if run is None or run.place is not place or now - run.used_at > _TOGETHER_S:
            cell = self._counts.number(OPEN_KIND) * BINS
            run = self._open = Run([], cell, self._moment(now), 0, False)
            run.is_open = True
        old = self._run_of.get(key)
        if old is run:
            return
        if old is not None and not old.is_open:
            self._touched[key] = old
        is_empty = not run.keys
        run.keys.append(key)
        run.resize(run.size + 1)
        self._move(key, run, place)
        run.live += 1
        if is_empty:
            self._begin(run, place)

    def use_request(
        self, pieces: Iterable[Piece], now: float, signals: RequestSignals = NO_SIGNALS
    ) -> None:
        """Add the blocks of a request that is over, or note their use.

        Args:
            pieces: the blocks of its prompt, from the first one on.
            now: the time in seconds.
            signals: what else is known of the request.
        """
        self._ages.advance(now, self._fits.prices)
        self._open = None
        pieces = list(pieces)
        keys = [key for piece in pieces for key in piece[0]]
        if not keys:
            return
        found = list(stretches(keys, self._run_of, self._gone.runs, self._touched))
        if self._touched:
            self._forget_touched(keys)

        def on_return(run: Run, stretch: Stretch) -> None:
            self._count_return(run, stretch, now)

        parts = parts_of(found, len(keys), now, signals, self._counts, on_return)
        # A run for each stretch of one kind and one place.
        start, used_at = 0, self._moment(now)
        ends = iter(parts)
        kind_end, cell, turn, is_shared = next(ends)
        whole = Whole()
        for piece, ttl_s, org in pieces:
            if not piece:
                continue
            place = self.places.make(org, ttl_s > LONG_TTL_S)
            piece_end = start + len(piece)
            while start < piece_end:
                end = min(kind_end, piece_end)
                run = Run(keys[start:end], cell, used_at, turn, is_shared, whole)
                self._gather(run, place)
                self._begin(run, place)
                start = end
                if start == kind_end:
                    kind_end, cell, turn, is_shared = next(ends, (len(keys) + 1, 0, 0, False))
                    whole = Whole()
        if self._fits.is_due():
            self._gone.advance(now)
        if self._fits.count_request():
            self.places.note_new_prices()
        self.places.relist(self.prices)

    def remove(self, key: bytes) -> None:
        """Remove ``key``; one that is not known is ignored."""
        self.remove_all((key,))

    def remove_all(self, keys: Iterable[bytes]) -> None:
        """Remove ``keys``; those that are not known are ignored."""
        if self._touched:
            keys = list(keys)
            self._forget_touched(keys)
        run_of, held = self._run_of, dict[Place, int]()
        gone: dict[Run, int] = {}
        last, blocks = None, 0
        for run in map(run_of.pop, keys, repeat(None)):
            if run is last:
                blocks += 1
                continue
            if last is not None:
                gone[last] = gone.get(last, 0) + blocks
            last, blocks = run, 1
        if last is not None:
            gone[last] = gone.get(last, 0) + blocks
        for run, blocks in gone.items():
            place = _place_of(run)
            held[place] = held.get(place, 0) + blocks
            run.live -= blocks
            if not run.live:
                self._end(run)
                continue
            keys_of = run.keys
            while keys_of and run_of.get(keys_of[-1]) is not run:
                keys_of.pop()
        for place, blocks in held.items():
            self._count(place, -blocks)

    def tell(self, key: bytes, ended: Ended) -> None:
        """Note how the answer to a request ended that is over, and that this is known only now.

        Args:
            key: the last block of its prompt; ignored if it is not there, or was used since.
            ended: how it ended.
        """
        run = self._run_of.get(key)
        if run is None or run.is_open or run.cell == OVER or run.keys[-1] != key:
            return
        kind = self._counts.kind(run.cell)
        if len(kind) == len(OPEN_KIND) and kind[0] == Group.CONVERSATION and not run.is_shared:
            self._change(run, (*kind[:-1], int(ended)))

    def retire(self, keys: Iterable[bytes]) -> int:
        """Evict ``keys`` before all others of their class from here on, unless they are used again:
        it is known that they are not needed. Return how many there are."""
        wanted = set(keys)
        runs = {run: None for key in wanted if (run := self._run_of.get(key)) is not None}
        over: dict[Place, Run] = {}
        for old in sorted(runs, key=lambda run: run.used_at):
            place = _place_of(old)
            if (run := over.get(place)) is None:
                run = over[place] = Run([], OVER, self._moment(self._used_at), old.turn, False)
            of_old = [k for k in old.keys if k in wanted and self._run_of.get(k) is old]
            for key in of_old:
                run.keys.append(key)
                self._move(key, run, place)
        for place, run in over.items():
            run.live = len(run.keys)
            run.resize(run.live)
            self._begin(run, place)
        return sum(run.live for run in over.values())

    def reassign(self, keys: Iterable[bytes], org: bytes, is_long: bool) -> None:
        """Have ``keys`` count for another organisation from here on, or be kept longer or not. What
        is known of them, and their age, stays. Those that are not known are ignored.

        Args:
            keys: in prompt order.
            org: the organisation's tag.
            is_long: whether they are marked to live longer.
        """
        moved: dict[Run, list[bytes]] = {}
        for key in keys:
            run = self._run_of.get(key)
            if run is None:
                continue
            old = _place_of(run)
            if old.org != org or old.is_long != is_long:
                moved.setdefault(run, []).append(key)
        for run, keys_of in moved.items():
            self._split(run, keys_of, self.places.make(org, is_long))

    def clear(self) -> None:
        """Remove all keys. What was learned is kept."""
        self.remove_all(list(self._run_of))

    # Victims.

    def victims(
        self, count: int, now: float, must_stay: Callable[[bytes], bool]
    ) -> list[bytes] | None:
        """Return the keys to evict first, the most dispensable one first, without removing them.

        Args:
            count: how many.
            now: current time in seconds.
            must_stay: whether a key may not be evicted: it is in use, or belongs to the very
                request that needs the room.

        Returns:
            ``count`` keys; None if fewer may be evicted.
        """
        chosen = self.victims_up_to(count, now, must_stay)
        return chosen if len(chosen) == count else None

    def victims_up_to(
        self, count: int, now: float, must_stay: Callable[[bytes], bool]
    ) -> list[bytes]:
        """Return the ``count`` keys to evict first, or as many as may be evicted; see `victims`."""
        self._ages.advance(now, self._fits.prices)
        return RunSelection(self, must_stay).take(count)

    def victims_of(
        self, org: bytes, count: int, now: float, must_stay: Callable[[bytes], bool]
    ) -> list[bytes]:
        """Return up to ``count`` keys of ``org`` to evict first; see `victims`."""
        self._ages.advance(now, self._fits.prices)
        return RunSelection(self, must_stay).take_of(org, count)

    def price_of(self, key: bytes) -> float:
        """Return what the place of a block earns that is there."""
        return self.prices.of(self._run_of[key].cell)

    def rank_of(self, key: bytes) -> tuple[float, float]:
        """Return the price of a block that is there, and when it was used last, in seconds."""
        run = self._run_of[key]
        return self.prices.of(run.cell), run.used_at

    def worth(self, key: bytes, before: bytes | None = None) -> float:
        """Return what the places of evicted blocks would earn; 0 if they are not remembered.

        Args:
            key: the first of them.
            before: the block in front of it, with which they may have been used; None for none.
        """
        cell = self._gone.cell_of(key)
        if cell is None and before is not None and (run := self._run_of.get(before)) is not None:
            cell = run.cell
        return 0.0 if cell is None else max(0.0, self.prices.of(cell))

    # What was learned.

    def counted(self) -> Counted:
        """Return a copy of what was counted."""
        return self._counts.counted()

    def restore(self, state: Any) -> bool:
        """Go on from what `Counted.state` returned. To be called before the first block.

        Returns:
            Whether it could be used; otherwise the order learns from the start.
        """
        if not self._counts.restore(state, KIND_LENGTHS):
            return False
        self._fits.fit()
        return True

    # What follows is for `RunSelection`.

    @property
    def prices(self) -> Prices:
        """The prices that count."""
        return self._fits.prices

    @property
    def runs(self) -> Mapping[bytes, Run]:
        """The run that each block is in."""
        return self._run_of

    # Runs.

    def _count_return(self, run: Run, stretch: Stretch, now: float) -> None:
        used = stretch.end - stretch.start
        part = used / max(used, run.size)
        if run.place is None:
            self._gone.take(run, now)
        self._counts.add_return(run.cell, now - run.used_at, part)
        run.resize(max(0, run.size - used))
        # Whether what is left of it returns could no longer be told by its first block.
        run.first = None

    def _change(self, run: Run, kind: Kind) -> None:
        """Give a run another kind. Its age begins anew, by the little that the news took."""
        run.cell, run.used_at = self._counts.number(kind) * BINS, self._moment(self._used_at)
        self._begin(run, _place_of(run))

    def _split(self, old: Run, keys: list[bytes], place: Place) -> None:
        """Move a part of a run to another place, to the part of it that is there already if it was
        not used since."""
        run, moment = old.beside, (old.cell, old.used_at)
        if run is None or run.place is not place or (run.cell, run.used_at) != moment:
            run = old.beside = Run([], *moment, old.turn, old.is_shared, old.whole)
            run.is_open = old.is_open
        is_new = not run.live
        old.resize(max(0, old.size - len(keys)))
        # A prompt's end goes first, as a rule: what follows later stands in front of it.
        run.keys[:0] = keys
        run.first = keys[0]
        for key in keys:
            self._move(key, run, place)
        run.live += len(keys)
        run.resize(run.size + len(keys))
        if is_new:
            self._ages.join(run)
            if (rank := place.insert(run, self._fits.prices)) is not None:
                self.places.lower(place, rank)

    def _gather(self, run: Run, place: Place) -> None:
        """Move the blocks of a run there from where they were."""
        run_of, keys = self._run_of, run.keys
        new = 0
        for key in keys:
            old = run_of.get(key)
            if old is None:
                run_of[key] = run
                new += 1
            elif old.place is place:
                run_of[key] = run
                old.live -= 1
                if not old.live:
                    self._end(old)
            else:
                self._move(key, run, place)
        run.live = len(keys)
        self._count(place, new)

    def _move(self, key: bytes, run: Run, place: Place) -> None:
        old = self._run_of.get(key)
        self._run_of[key] = run
        if old is None:
            self._count(place, 1)
            return
        old_place = _place_of(old)
        if old_place is not place:
            self._count(place, 1)
            self._count(old_place, -1)
        old.live -= 1
        if not old.live:
            self._end(old)

    def _begin(self, run: Run, place: Place) -> None:
        """Note that a run has just been used."""
        self._ages.begin(run)
        if (rank := place.add(run, self._fits.prices)) is not None:
            self.places.lower(place, rank)

    def _end(self, run: Run) -> None:
        """Note that a run has no blocks left: from now on it is only remembered."""
        run.keys, run.place, run.beside = [], None, None
        if run.first is not None and run.size > 0 and not run.is_open:
            self._gone.add(run)

    def _forget_touched(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            self._touched.pop(key, None)

    # Ages.

    def _moment(self, now: float) -> float:
        """Return a time of use that is later than all others, by next to nothing if the clock has
        not moved: of blocks that are worth the same the one unused for longest goes first."""
        self._used_at = max(now, nextafter(self._used_at, inf))
        return self._used_at

    def _count(self, place: Place, blocks: int) -> None:
        """Note that a place has so many more blocks, or less of them."""
        self.places.hold(place, blocks, self._fits.prices)


def _place_of(run: Run) -> Place:
    """Return the place of a run that has blocks."""
    assert run.place is not None
    return run.place
