"""A bar that shows how far files have been read, on a terminal."""

import gzip
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from vllm_cachescope.cli.report.ordered_calls import AnyCall
from vllm_cachescope.cli.traffic import STANDARD_INPUT

_EVERY = 64  # calls between two looks at the clock
_CHUNK = 1 << 20


def with_progress(
    calls: Iterable[tuple[Path, AnyCall]], paths: Sequence[Path]
) -> Iterator[tuple[Path, AnyCall]]:
    """Yield ``calls``, and show meanwhile how many lines of ``paths`` are behind them.

    Nothing is shown where standard error is no terminal.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield from calls
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[calls]:,} calls"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("Reading", total=_lines(paths), calls=0)
        line_of: dict[Path, int] = {}
        lines = 0
        for count, (path, call) in enumerate(calls, 1):
            line = _line(call.source)
            lines += max(0, line - line_of.get(path, 0))
            line_of[path] = max(line, line_of.get(path, 0))
            if count % _EVERY == 0:
                progress.update(task, completed=lines, calls=count)
            yield path, call
        progress.update(task, description="Finding the best breakpoints", total=None)


def _line(source: str) -> int:
    """Return the line of a call, from its source: ``traffic.har:1#12`` stands in line 1."""
    number = source.rpartition(":")[2].partition("#")[0]
    return int(number) if number.isdigit() else 0


def _lines(paths: Sequence[Path]) -> int | None:
    """Return how many lines files have; None if that cannot be known in front."""
    count = 0
    for path in paths:
        if path == STANDARD_INPUT or not path.is_file():
            return None
        try:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    count += chunk.count(b"\n")
        except (EOFError, OSError, zlib.error):
            return None
    return max(1, count)
