"""The parts of a prompt that are of one kind, by what its blocks were in before."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from vllm_cachescope.cache.return_counts import BINS, OVER, ReturnCounts
from vllm_cachescope.cache.runs import (
    PARTIAL_KIND,
    RequestSignals,
    Run,
    Stretch,
    Whole,
    conversation_kind,
    shared_kind,
)


class Part(NamedTuple):
    """Consecutive blocks of a prompt that are of one kind.

    Attributes:
        end: where they end, in blocks from the start of the prompt.
        cell: the cell of their kind in the first bin of ages.
        turn: how many requests of the same conversation came before.
        is_shared: whether prompts part behind them.
    """

    end: int
    cell: int
    turn: int
    is_shared: bool


def parts_of(
    found: Sequence[Stretch],
    length: int,
    now: float,
    signals: RequestSignals,
    counts: ReturnCounts,
    on_return: Callable[[Run, Stretch], None],
) -> list[Part]:
    """Return the parts of a prompt, in its order.

    Args:
        found: where its blocks were before.
        length: how many blocks it has.
        now: the time in seconds.
        signals: what is known of the request.
        counts: numbers the kinds.
        on_return: is told of each run of which a stretch was used again.
    """
    parts: list[Part] = []
    known = turn = 0
    full = length - signals.ends_partial
    parted_runs = parted(found, full)
    for stretch in found:
        run = stretch.run
        if run is None:
            continue
        is_parted = run in parted_runs
        turn = 0 if run.is_shared else run.turn + (not is_parted)
        known = stretch.end
        on_return(run, stretch)
        if is_parted:
            if parts and parts[-1].end < stretch.start:
                parts.clear()
            cell = counts.number(shared_kind(now - run.used_at)) * BINS
            parts.append(Part(min(stretch.end, full), cell, run.turn, True))
    shared_end = parts[-1].end if parts else 0
    if full > shared_end:
        kind = conversation_kind(turn, length - known, signals)
        parts.append(Part(full, counts.number(kind) * BINS, turn, False))
    if signals.ends_partial:
        parts.append(Part(length, counts.number(PARTIAL_KIND) * BINS, turn, False))
    return parts


def parted(found: Sequence[Stretch], full: int) -> set[Run]:
    """Return the runs behind whose blocks prompts part: those of which that was known, and those of
    a whole that this prompt has not used all of, and goes on with blocks that are known from
    elsewhere. What is not known may be what has left, as far as that goes.

    Args:
        found: where the prompt's blocks were before.
        full: how many of them are full.
    """
    used, ends = dict[Whole, int](), dict[Whole, int]()
    whole: Whole | None = None
    for run, start, end in found:
        blocks = end - start
        if run is not None:
            whole = run.whole
        elif whole is not None:
            blocks = min(blocks, whole.size - used[whole])
        if whole is not None and blocks > 0:
            used[whole] = used.get(whole, 0) + blocks
            ends[whole] = start + blocks
    left = {whole for whole, end in ends.items() if used[whole] < whole.size and end < full}
    runs = {run for run, _, _ in found if run is not None}
    return {run for run in runs if run.is_shared or (run.whole in left and run.cell != OVER)}
