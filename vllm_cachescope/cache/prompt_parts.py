"""The parts of a prompt that are of one kind, by what its blocks were in before."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from vllm_cachescope.cache.return_counts import BINS, OVER, ReturnCounts
from vllm_cachescope.cache.runs import (
    PARTIAL_KIND,
    RequestSignals,
    Run,
    Stretch,
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
    found: Iterable[Stretch],
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
    for stretch in found:
        run = stretch.run
        if run is None:
            continue
        used = stretch.end - stretch.start
        parted = run.is_shared or (used < run.size and stretch.end < full and run.cell != OVER)
        turn = 0 if run.is_shared else run.turn + (not parted)
        known = stretch.end
        on_return(run, stretch)
        if parted:
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
