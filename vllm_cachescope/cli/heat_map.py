"""A heat map of a session: what of each prompt was read, lost or new, turn by turn.

A row is a call and a column a stretch of the prompt, so that a value that breaks each turn shows as
a column, and a pause as a row.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from vllm_cachescope.cli.explanation import Explained

_READ, _LOST, _NEW = ("█", "green"), ("▓", "bold red"), ("░", "bright_black")
_WIDTH = 60
_ROWS = 40
_SESSIONS = 10


@dataclass(frozen=True, slots=True)
class HeatRow:
    """One call of a session.

    Attributes:
        source: file and line of the call.
        tokens: tokens of its prompt.
        read: leading tokens that a cache would have read.
        lost: tokens behind them that it would have read but for a loss.
        code: the code of the rule that cost most here; empty without a loss.
    """

    source: str
    tokens: int
    read: int
    lost: int
    code: str


def heat_rows(calls: Iterable[Explained]) -> dict[tuple[str, str | None], list[HeatRow]]:
    """Return the rows of each session, by its file and its name, those that lost most first."""
    sessions: dict[tuple[str, str | None], list[HeatRow]] = {}
    for call in calls:
        tokens = call.diagnosis.prompt_tokens
        read = tokens - sum(n for _, n in call.diagnosis.uncached)
        lost = min(sum(loss.tokens for loss in call.losses), tokens - read)
        code = call.losses[0].rule.code if call.losses else ""
        row = HeatRow(call.source, tokens, read, lost, code)
        sessions.setdefault((call.file, call.session), []).append(row)
    return dict(sorted(sessions.items(), key=lambda one: -sum(row.lost for row in one[1])))


def render(calls: Iterable[Explained], console: Console) -> None:
    """Print the heat maps of the sessions that lost most."""
    sessions = heat_rows(calls)
    legend = Text("Stability by turn: ")
    for (cell, style), words in ((_READ, "read"), (_LOST, "lost"), (_NEW, "new")):
        legend.append(cell, style=style).append(f" {words}  ")
    console.print(legend, highlight=False)
    for (file, session), rows in list(sessions.items())[:_SESSIONS]:
        name = f"{file}, session {session}" if session else file
        console.print(name, style="bold", markup=False, highlight=False, soft_wrap=True)
        longest = max(1, max(row.tokens for row in rows))
        for row in _thinned(rows):
            console.print(_line(row, longest), highlight=False, soft_wrap=True)
        if (left := len(rows) - _ROWS) > 0:
            console.print(f"  {left:,} turns are not shown: those without a loss first")
    if (more := len(sessions) - _SESSIONS) > 0:
        console.print(f"{more:,} more sessions")


def _thinned(rows: list[HeatRow]) -> list[HeatRow]:
    """Return `_ROWS` of the rows at most, those that lost something first, in their order."""
    chosen = sorted(range(len(rows)), key=lambda i: (-rows[i].lost, i))[:_ROWS]
    return [rows[i] for i in sorted(chosen)]


def _line(row: HeatRow, longest: int) -> Text:
    line = Text(f"  {row.source.rpartition(':')[2]:>7} ")
    ends = [round(_WIDTH * n / longest) for n in (row.read, row.read + row.lost, row.tokens)]
    if row.lost and ends[1] == ends[0]:
        ends[1] += 1  # A small loss shows, too.
    start = 0
    for (cell, style), end in zip((_READ, _LOST, _NEW), ends, strict=True):
        line.append(cell * max(0, end - start), style=style)
        start = max(start, end)
    line.append(" " * max(0, _WIDTH - start))
    share = f"{row.read / row.tokens:.0%}" if row.tokens else "none"
    return line.append(f" {share:>5} {row.code}")
