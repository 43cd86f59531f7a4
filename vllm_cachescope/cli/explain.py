"""``cachescope explain``: says of recorded traffic where prefixes broke, and why."""

import argparse
import json
import secrets
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_cachescope.cache.miss_causes import CacheMiss, MissCause
from vllm_cachescope.cli.console import show
from vllm_cachescope.cli.traffic import BLOCK_TOKENS, BlockCall, Call, TrafficError, read_traffic
from vllm_cachescope.cli.ttl_replay import TtlReplay
from vllm_cachescope.diagnosis.attribution import EngineReport
from vllm_cachescope.diagnosis.diagnosis import conclude, diagnose
from vllm_cachescope.diagnosis.fingerprinter import Fingerprinter
from vllm_cachescope.diagnosis.forest import LineageNode
from vllm_cachescope.diagnosis.lineage_store import LineageStore
from vllm_cachescope.diagnosis.outcome import NEW_CONTENT, Diagnosis, DiagnosisKind
from vllm_cachescope.durations import parse_duration
from vllm_cachescope.prompt.boundaries import common_prefix
from vllm_cachescope.tenancy.scope import Caller

_REQUESTS = 256
_ENDS = 2**16
_SESSION_TTL_S = 7 * 86400.0
_BYTES = 2**30
_SHOWN_CHANGES = 10


@dataclass(frozen=True, slots=True)
class Explained:
    """One call and its diagnosis.

    Attributes:
        source: file and line of the call.
        session: its session.
        at: when it was made, in seconds.
        diagnosis: why it could not be read from the cache in full.
        char: for a text trace, how many leading characters it shares with its ancestor's prompt.
    """

    source: str
    session: str | None
    at: float | None
    diagnosis: Diagnosis
    char: int | None = None

    @property
    def is_break(self) -> bool:
        """Whether a prefix broke here, expected or not."""
        return self.diagnosis.kind.is_break and (
            self.diagnosis.missed_tokens > 0 or not self.diagnosis.expected
        )

    @property
    def could_share(self) -> bool:
        """Whether it begins a conversation whose tools and system prompt nearly equal another's."""
        return not self.is_break and self.diagnosis.missed_tokens > 0

    @property
    def file(self) -> str:
        """The file it is from."""
        return self.source.rpartition(":")[0]

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data for JSON."""
        return {
            "source": self.source,
            "session": self.session,
            "at": self.at,
            "char": self.char,
            **self.diagnosis.to_dict(),
        }


@dataclass(frozen=True, slots=True)
class Total:
    """What one cause cost: how many calls it was the cause of, and how many uncached tokens."""

    calls: int = 0
    tokens: int = 0


@dataclass(slots=True)
class Explanation:
    """All calls of some traffic, explained."""

    calls: list[Explained] = field(default_factory=list)

    @property
    def breaks(self) -> list[Explained]:
        """The calls at which a prefix broke, expected or not."""
        return [call for call in self.calls if call.is_break]

    @property
    def unexpected(self) -> list[Explained]:
        """The breaks that should not have happened."""
        return [call for call in self.breaks if not call.diagnosis.expected]

    @property
    def could_share(self) -> list[Explained]:
        """The calls that begin a conversation and could have shared more with another."""
        return [call for call in self.calls if call.could_share]

    def totals(self) -> dict[str, Total]:
        """Return what each cause cost, the costliest first."""
        calls = Counter(call.diagnosis.cause for call in self.calls)
        tokens: Counter[str] = Counter()
        for call in self.calls:
            tokens.update(dict(call.diagnosis.uncached))
        causes = sorted(calls.keys() | tokens.keys(), key=lambda c: (-tokens[c], -calls[c], c))
        return {str(cause): Total(calls[cause], tokens[cause]) for cause in causes}

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(call.diagnosis.prompt_tokens for call in self.calls)

    @property
    def reusable_tokens(self) -> int:
        """Tokens that a cache which loses nothing, or not before its TTL, would have read."""
        uncached = sum(n for call in self.calls for _, n in call.diagnosis.uncached)
        return self.prompt_tokens - uncached

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data for JSON."""
        return {
            "calls": [call.to_dict() for call in self.calls],
            "totals": {
                cause: {"calls": total.calls, "tokens": total.tokens}
                for cause, total in self.totals().items()
            },
            "prompt_tokens": self.prompt_tokens,
            "reusable_tokens": self.reusable_tokens,
            "breaks": len(self.breaks),
            "unexpected_breaks": len(self.unexpected),
            "could_share": len(self.could_share),
        }


def explain(calls: Iterable[Call], ttl_s: float | None = None) -> Iterator[Explained]:
    """Explain calls in order, each against its nearest ancestor in its session.

    The cache is taken to hold all it was given, except what ``ttl_s`` lets expire.

    Args:
        calls: the calls.
        ttl_s: the lifetime in seconds, since its last use, of what names none of its own; None
            for no end, whatever is named. Nothing expires for a call without a timestamp.
    """
    now = 0.0

    def clock() -> float:
        return now

    store = LineageStore(
        clock,
        ttl_s=_SESSION_TTL_S,
        requests=_REQUESTS,
        ends=_ENDS,
        org_bytes=_BYTES,
        max_bytes=_BYTES,
    )
    fingerprint = Fingerprinter(secrets.token_bytes(32))
    texts: dict[LineageNode, str] = {}
    lifetimes: dict[str | None, TtlReplay] = {}
    for call in calls:
        now = max(now, call.at or now)
        caller = Caller("traffic", call.session)
        placement = store.observe(caller, fingerprint(call.request, call.extra))
        store.answered(caller, placement.node, call.response_id)
        diagnosis = diagnose(placement)
        if ttl_s is not None:
            expired = lifetimes.setdefault(call.session, TtlReplay(ttl_s, _REQUESTS)).use(placement)
            if expired and call.at is not None:
                diagnosis = _with_expired(diagnosis, expired)
        char = None
        if call.text is not None:
            texts[placement.node] = call.text
            before = texts.get(placement.ancestor, "") if placement.ancestor else ""
            char = common_prefix(before, call.text)
        yield Explained(call.source, call.session, call.at, diagnosis, char)


def explain_blocks(calls: Iterable[BlockCall], ttl_s: float | None = None) -> Iterator[Explained]:
    """Explain calls of which only the hashes of their blocks are known.

    There are no sessions in such a trace: a call is compared with all calls before it. A last
    block that was not full has another hash once the conversation goes on.

    Args:
        calls: the calls, in order.
        ttl_s: the lifetime of a block since its last use, in seconds; None for no end.
    """
    last_call: dict[int, BlockCall] = {}
    lineage_of: dict[int, int] = {}
    lineages = 0
    for call in calls:
        known = _leading(call, last_call, None)
        fresh = _leading(call, last_call, ttl_s)
        before = last_call[call.blocks[known - 1]] if known else None
        partial = 0
        if before is None:
            kind = DiagnosisKind.NEW_LINEAGE if last_call else DiagnosisKind.FIRST_REQUEST
        elif known == len(call.blocks):
            kind = DiagnosisKind.RETRY if before.blocks == call.blocks else DiagnosisKind.FORK
        elif known == len(before.blocks):
            kind = DiagnosisKind.CONTINUATION
        elif known == len(before.blocks) - 1 and before.tokens % BLOCK_TOKENS:
            kind = DiagnosisKind.CONTINUATION
            partial = max(0, min(before.tokens, call.tokens) - known * BLOCK_TOKENS)
        else:
            kind = DiagnosisKind.FORK
        if kind in (DiagnosisKind.CONTINUATION, DiagnosisKind.RETRY):
            lineage = lineage_of[call.blocks[known - 1]]
        else:
            lineages += 1
            lineage = lineages
        yield Explained(
            call.source,
            None,
            call.at,
            _of_blocks(call, kind, known, fresh, partial, lineage, ttl_s),
        )
        for block in call.blocks:
            last_call[block] = call
            lineage_of[block] = lineage


def _leading(call: BlockCall, last_call: dict[int, BlockCall], ttl_s: float | None) -> int:
    """Return how many leading blocks an earlier call had, ``ttl_s`` ago at most."""
    for i, block in enumerate(call.blocks):
        before = last_call.get(block)
        if before is None or (ttl_s is not None and call.at - before.at > ttl_s):
            return i
    return len(call.blocks)


def _of_blocks(
    call: BlockCall,
    kind: DiagnosisKind,
    known: int,
    fresh: int,
    partial: int,
    lineage: int,
    ttl_s: float | None,
) -> Diagnosis:
    shared = min(known * BLOCK_TOKENS, call.tokens)
    read = min(fresh * BLOCK_TOKENS, call.tokens)
    engine: list[CacheMiss] = []
    if shared > read and ttl_s is not None:
        engine.append(CacheMiss(MissCause.EXPIRED, shared - read, ttl_s=round(ttl_s)))
    if partial:
        engine.append(CacheMiss(MissCause.PARTIAL_BLOCK, partial))
    causes: dict[str, int] = {miss.cause: miss.tokens for miss in engine}
    rest = call.tokens - read - sum(causes.values())
    if rest:
        own = kind in (DiagnosisKind.FIRST_REQUEST, DiagnosisKind.NEW_LINEAGE)
        causes[kind if own else NEW_CONTENT] = rest
    return Diagnosis(
        kind=kind,
        expected=shared == read,
        where=None,
        changes=(),
        shared_tokens=shared,
        missed_tokens=0,
        prompt_tokens=call.tokens,
        uncached=tuple(causes.items()),
        engine=tuple(engine),
        lineage=lineage,
        measured=True,
    )


def _with_expired(diagnosis: Diagnosis, misses: Sequence[CacheMiss]) -> Diagnosis:
    shared = diagnosis.shared_tokens
    read = shared - sum(miss.tokens for miss in misses)
    report = EngineReport(diagnosis.prompt_tokens, read, 1, tuple(misses), shared_tokens=shared)
    return conclude(diagnosis, report)


def add_command(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``explain`` to the command line; ``run(args)`` of the parsed arguments runs it."""
    parser = subparsers.add_parser(
        "explain",
        help="say where the prefixes of recorded traffic broke, and why",
        description="Read recorded requests and say at each where its prefix broke, and why. "
        "Counts are estimates, at four bytes a token. Exit code: 0; 1 if there are more "
        "unexpected breaks than --max-breaks; 2 if a file cannot be read.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help=_FILE_HELP)
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


_FILE_HELP = (
    "JSON lines of request bodies, of envelopes around them, or of a text or block trace; "
    ".gz is unpacked"
)


def run(args: argparse.Namespace) -> int:
    """Run ``cachescope explain`` and return its exit code."""
    explanation = Explanation()
    try:
        for path in args.files:
            explanation.calls.extend(explain_file(path, args.ttl))
    except (OSError, TrafficError) as error:
        print(f"cachescope explain: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(explanation.to_dict(), indent=2))
    else:
        show(lambda console: render(explanation, console))
    unexpected = len(explanation.unexpected)
    return int(args.max_breaks is not None and unexpected > args.max_breaks)


def explain_file(path: Path, ttl_s: float | None = None) -> Iterator[Explained]:
    """Explain the calls in a file.

    Raises:
        OSError: if it cannot be read.
        TrafficError: on a line that cannot be understood.
    """
    calls: Sequence[Call] | Sequence[BlockCall] = read_traffic(path)
    if calls and isinstance(calls[0], BlockCall):
        yield from explain_blocks((c for c in calls if isinstance(c, BlockCall)), ttl_s)
    else:
        yield from explain((c for c in calls if isinstance(c, Call)), ttl_s)


def render(explanation: Explanation, console: Console) -> None:
    """Print the breaks lineage by lineage, what could have shared more, and totals by cause."""
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
    table = Table(title="Uncached tokens by cause", title_justify="left")
    table.add_column("cause")
    table.add_column("calls", justify="right")
    table.add_column("tokens", justify="right")
    for cause, total in explanation.totals().items():
        table.add_row(cause, f"{total.calls:,}", f"{total.tokens:,}")
    console.print(table)
    tokens, reusable = explanation.prompt_tokens, explanation.reusable_tokens
    share = f"{reusable / tokens:.1%}" if tokens else "none"
    console.print(
        f"{len(explanation.calls):,} calls, {tokens:,} prompt tokens, {share} reusable; "
        f"{len(explanation.breaks)} breaks, {len(explanation.unexpected)} of them unexpected; "
        f"{len(explanation.could_share)} new lineages could have shared more.",
        soft_wrap=True,
    )


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
