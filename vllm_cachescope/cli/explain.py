"""``cachescope explain``: says of recorded traffic where prefixes broke, and why."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_cachescope.cli import traffic_files
from vllm_cachescope.cli.block_trace import explain_blocks
from vllm_cachescope.cli.console import show
from vllm_cachescope.cli.explaining import explain
from vllm_cachescope.cli.explanation import Explained, Explanation
from vllm_cachescope.cli.shared_prefixes import SharedPrefixes
from vllm_cachescope.cli.traffic import BlockCall, Call, TrafficError
from vllm_cachescope.durations import parse_duration
from vllm_cachescope.prompt.ignored_marker import IgnoredMarker

_SHOWN_CHANGES = 10
_SHOWN_IGNORED = 20


def add_command(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``explain`` to the command line; ``run(args)`` of the parsed arguments runs it."""
    parser = subparsers.add_parser(
        "explain",
        help="say where the prefixes of recorded traffic broke, and why",
        description="Read recorded requests and say at each where its prefix broke, and why. "
        "Counts are estimates, at four bytes a token. Exit code: 0; 1 if there are more "
        "unexpected breaks than --max-breaks; 2 if a file cannot be read, or holds no request.",
    )
    traffic_files.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print every call as JSON")
    parser.add_argument("--max-breaks", type=_count, metavar="N", help="unexpected breaks to allow")
    parser.add_argument(
        "--ttl", type=_duration, metavar="TTL", help="let cached prefixes expire, as in 5m"
    )
    parser.set_defaults(run=run)


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a count: write a number, 0 or more")
    return int(text)


def _duration(text: str) -> int:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run(args: argparse.Namespace) -> int:
    """Run ``cachescope explain`` and return its exit code."""
    explanation = Explanation()
    prefixes = SharedPrefixes(args.ttl)
    try:
        for _, calls in traffic_files.read(args):
            explanation.calls.extend(explain_calls(calls, args.ttl, prefixes))
    except (OSError, TrafficError) as error:
        print(f"cachescope explain: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(explanation.to_dict(), indent=2))
    else:
        show(lambda console: render(explanation, console))
    unexpected = len(explanation.unexpected)
    return int(args.max_breaks is not None and unexpected > args.max_breaks)


def explain_calls(
    calls: Sequence[Call] | Sequence[BlockCall],
    ttl_s: float | None = None,
    prefixes: SharedPrefixes | None = None,
) -> Iterator[Explained]:
    """Explain the calls of one file.

    Args:
        calls: what `read_traffic` has read.
        prefixes: what the calls of other files have left; None for nothing.
        ttl_s: see `explanation.explain` and `block_trace.explain_blocks`.
    """
    if calls and isinstance(calls[0], BlockCall):
        yield from explain_blocks((c for c in calls if isinstance(c, BlockCall)), ttl_s)
    else:
        yield from explain((c for c in calls if isinstance(c, Call)), ttl_s, prefixes)


def render(explanation: Explanation, console: Console) -> None:
    """Print the breaks by lineage, the lineages that could have shared more, and a table of
    uncached tokens by cause."""
    several = len({call.file for call in explanation.calls}) > 1
    by_lineage: dict[str, list[Explained]] = {}
    for call in explanation.breaks:
        names = [call.file] if several else []
        names += [f"session {call.session}"] if call.session else []
        names += [f"lineage {call.diagnosis.lineage}"]
        by_lineage.setdefault(", ".join(names), []).append(call)
    for name, calls in by_lineage.items():
        _render_calls(name, calls, console)
    if not by_lineage:
        console.print("No prefix broke.")
    if alike := explanation.could_share:
        _render_calls("new lineages that could have shared more", alike, console)
    _render_ignored(explanation, console)
    table = Table(title="Uncached tokens by cause", title_justify="left")
    table.add_column("cause")
    table.add_column("calls", justify="right")
    table.add_column("tokens", justify="right")
    for cause, total in explanation.totals().items():
        table.add_row(cause, f"{total.calls:,}", f"{total.tokens:,}")
    console.print(table)
    for scope, shared in explanation.shared.items():
        console.print(f"{shared:,} tokens of scope {scope.label} were left by other conversations.")
    tokens, reusable = explanation.prompt_tokens, explanation.reusable_tokens
    fraction = f"{reusable / tokens:.1%}" if tokens else "none"
    console.print(
        f"{len(explanation.calls):,} calls, {tokens:,} prompt tokens, {fraction} reusable; "
        f"{len(explanation.breaks)} breaks, {len(explanation.unexpected)} of them unexpected; "
        f"{len(explanation.could_share)} new lineages could have shared more.",
        soft_wrap=True,
    )


def _render_ignored(explanation: Explanation, console: Console) -> None:
    """Print each place of a marker that a server ignores, once."""
    first: dict[IgnoredMarker, str] = {}
    times: Counter[IgnoredMarker] = Counter()
    for call in explanation.calls:
        for marker in call.ignored:
            first.setdefault(marker, call.source)
            times[marker] += 1
    if not first:
        return
    console.print("Ignored markers", style="bold")
    for marker, source in list(first.items())[:_SHOWN_IGNORED]:
        line = Text(f"  {source}  ")
        line.append(marker.reason.value, style="yellow")
        line.append(f" at {marker.path}: {marker.reason.words}")
        if times[marker] > 1:
            line.append(f" ({times[marker]} times)")
        console.print(line, highlight=False, soft_wrap=True)
    if (more := len(first) - _SHOWN_IGNORED) > 0:
        console.print(f"      and at {more} more places")


def _render_calls(heading: str, calls: list[Explained], console: Console) -> None:
    console.print(heading, style="bold", markup=False, highlight=False, soft_wrap=True)
    for call in calls:
        _render_call(call, console)


def _render_call(call: Explained, console: Console) -> None:
    diagnosis = call.diagnosis
    where = diagnosis.where
    place = f" at {where.path}, token {where.token:,}" if where else ""
    line = Text(f"  {call.source}  ")
    line.append(diagnosis.kind, style="yellow" if diagnosis.expected else "bold red")
    line.append(f"{place}; {diagnosis.missed_tokens:,} tokens missed")
    console.print(line, highlight=False, soft_wrap=True)
    details = [str(change) for change in diagnosis.changes[:_SHOWN_CHANGES]]
    if more := len(diagnosis.changes) - len(details):
        details.append(f"and {more} more changes")
    if diagnosis.suggestion:
        details.append(f"→ {diagnosis.suggestion}")
    for detail in details:
        console.print(f"      {detail}", markup=False, highlight=False, soft_wrap=True)
