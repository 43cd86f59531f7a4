"""The calls of several files of recorded traffic, one after the other, in the order of time."""

import heapq
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from vllm_cachescope.cli.traffic import STANDARD_INPUT, BlockCall, Call, LeftOut, stream_traffic

AnyCall = Call | BlockCall

_WINDOW = 64  # calls that a recorder may have written before an earlier one
_MAX_OPEN = 128  # files that are read side by side; more would be too many to have open


def ordered_calls(paths: Sequence[Path], left_out: list[LeftOut]) -> Iterator[tuple[Path, AnyCall]]:
    """Yield the calls of files with the file of each, in order of time, as they are read.

    Recorders write a call when it ends: within a file, a call that began before the `_WINDOW` calls
    in front of it is put where it belongs, if all calls tell their time. Files whose first call
    tells its time are read side by side; all others one after the other.

    Args:
        paths: the files; ``-`` is standard input.
        left_out: takes the lines that cannot be understood.

    Raises:
        OSError: if a file cannot be read.
        TrafficError: if one is damaged.
    """
    timed = [path for path in paths if path != STANDARD_INPUT and _tells_time(path)][:_MAX_OPEN]
    streams = [_timed(number, path, left_out) for number, path in enumerate(timed)]
    for _, _, path, call in heapq.merge(*streams, key=lambda one: one[:2]):
        yield path, call
    for path in paths:
        if path not in timed:
            for call in in_order(stream_traffic(path, left_out)):
                yield path, call


def _tells_time(path: Path) -> bool:
    """Whether the first call in a file tells when it was made."""
    calls = stream_traffic(path, [])
    first = next(calls, None)
    calls.close()
    return first is not None and first.at is not None


def in_order(calls: Iterable[AnyCall]) -> Iterator[AnyCall]:
    """Yield calls in the order of time, as far as `_WINDOW` calls show it; a call without a time
    comes where it stands."""
    waiting: list[tuple[float, int, AnyCall]] = []
    for number, call in enumerate(calls):
        if call.at is None:
            while waiting:
                yield heapq.heappop(waiting)[2]
            yield call
            continue
        heapq.heappush(waiting, (call.at, number, call))
        if len(waiting) > _WINDOW:
            yield heapq.heappop(waiting)[2]
    while waiting:
        yield heapq.heappop(waiting)[2]


def _timed(
    number: int, path: Path, left_out: list[LeftOut]
) -> Iterator[tuple[float, int, Path, AnyCall]]:
    at = 0.0
    for call in in_order(stream_traffic(path, left_out)):
        at = max(at, call.at or at)
        yield at, number, path, call
