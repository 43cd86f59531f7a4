"""A report's calls, a line each."""

from collections.abc import Iterator

from vllm_cachescope.cli.console import printable
from vllm_cachescope.cli.report.recording import Recording

_SESSION = 16


def call_lines(recording: Recording) -> Iterator[str]:
    """Yield a heading, then a line for each call: its place, session and lineage, how long its
    prompt is and how much of it an earlier call had and a cache reads, and the cause."""
    yield _line("session", "lineage", "tokens", "shared", "read", "cause", "call")
    for row in recording.rows():
        tokens = row["tokens"]
        cause = row["cause"]
        if row["break"]:
            place = f" at {row['path']}" if row["path"] else ""
            cause = f"{cause}{place}, {row['missed']:,} tokens missed"
        yield _line(
            row["session"][-_SESSION:],
            str(row["lineage"]),
            f"{tokens:,}",
            _share(row["shared"], tokens),
            _share(row["read"], tokens),
            cause,
            row["source"],
        )


def _line(
    session: str, lineage: str, tokens: str, shared: str, read: str, cause: str, call: str
) -> str:
    numbers = f"{lineage:>7} {tokens:>11} {shared:>8} {read:>8}"
    return printable(f"{session:<{_SESSION}} {numbers}  {call}  {cause}")


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.2%}" if whole else "–"
