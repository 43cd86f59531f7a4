"""``cachescope lint``: finds what will break a prefix before it costs anything.

A value that is different in every request (a time, a UUID, a nonce) makes everything after it
unreadable from the cache. In tools and system prompts that is nearly the whole prompt, so that is
where it is looked for; a message keeps what it said.
"""

import argparse
import json
import re
import secrets
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from vllm_cachescope.fingerprint import Fingerprinter
from vllm_cachescope.prompt import Part, Protocol, Region
from vllm_cachescope.traffic import Call, TrafficError, read_traffic
from vllm_cachescope.wire.anthropic import is_dropped

_MAX_SCAN = 200_000  # characters of one string that are looked at
_MAX_LEAVES = 10_000  # strings of one part that are looked at
_MAX_PER_STRING = 5
_EXCERPT = 48

_MONTHS = "Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec"


class Severity(IntEnum):
    """INFO may be meant so; WARNING costs cache hits."""

    INFO = 0
    WARNING = 1


@dataclass(frozen=True, slots=True)
class Rule:
    """A kind of volatile text: its name, how it looks, what it is called in a message."""

    name: str
    pattern: "re.Pattern[str]"
    words: str


# In this order: a date inside a timestamp, or hex digits inside a UUID, are not found again.
RULES = (
    Rule(
        "uuid",
        re.compile(r"\b[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}\b"),
        "a UUID",
    ),
    Rule(
        "timestamp",
        re.compile(
            r"\b20\d\d-\d\d-\d\d[T ]\d\d:\d\d(?::\d\d)?"
            r"|\b(?:[01]?\d|2[0-3]):[0-5]\d:[0-5]\d\b"
            r"|\b1[5-9]\d{8}(?:\d{3})?\b"
        ),
        "a point in time",
    ),
    Rule(
        "date",
        re.compile(
            r"\b20\d\d[-/]\d{1,2}[-/]\d{1,2}\b"
            r"|\b\d{1,2}[-/.]\d{1,2}[-/.]20\d\d\b"
            rf"|\b(?:{_MONTHS})[a-z]{{0,6}}\.? \d{{1,2}}(?:st|nd|rd|th)?,? 20\d\d\b"
            rf"|\b\d{{1,2}}\.? (?:{_MONTHS})[a-z]{{0,6}}\.?,? 20\d\d\b"
        ),
        "an absolute date",
    ),
    Rule(
        "nonce",
        re.compile(
            r"(?i:\b(?:nonce|cch|trace[-_ ]?id|request[-_ ]?id|run[-_ ]?id|salt)\b[\"']?"
            r"\s{0,3}[:=]\s{0,3}[\"']?[\w-]{4,64})"
            r"|\b(?=[0-9a-f]{0,63}\d)(?=[0-9a-f]{0,63}[a-f])[0-9a-f]{16,64}\b"
        ),
        "a nonce or random id",
    ),
)


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that will, or may, break a prefix.

    Attributes:
        rule: ``uuid``, ``timestamp``, ``date``, ``nonce``, ``unsorted_json``, ``tool_order`` or
            ``breakpoint_after_volatile``.
        severity: how sure it is.
        path: where in the request.
        message: what it is, with an excerpt.
        source: file and line of the first request that has it.
        requests: how many requests have it.
    """

    rule: str
    severity: Severity
    path: str
    message: str
    source: str
    requests: int = 1


def lint(calls: Iterable[Call]) -> list[Finding]:
    """Return what is found in the calls, the worst first, each finding once per place."""
    fingerprint = Fingerprinter(secrets.token_bytes(32))
    found: dict[tuple[str, str], Finding] = {}
    times: Counter[tuple[str, str]] = Counter()
    orders: dict[tuple[str | None, frozenset[str]], list[str]] = {}
    tools: dict[tuple[str, bytes], bytes] = {}
    for call in calls:
        for finding in [
            *_volatile(call),
            *_key_order(call, fingerprint, tools),
            *_tool_order(call, fingerprint, orders),
        ]:
            key = (finding.rule, finding.path)
            times[key] += 1
            known = found.setdefault(key, finding)
            if finding.severity > known.severity:
                found[key] = finding
    counted = [
        Finding(f.rule, f.severity, f.path, f.message, f.source, times[key])
        for key, f in found.items()
    ]
    return sorted(counted, key=lambda finding: -finding.severity)


def _volatile(call: Call) -> Iterator[Finding]:
    worst: Part | None = None
    for part in call.request.parts:
        if part.region is Region.MESSAGES:
            break
        if call.request.protocol is Protocol.MESSAGES and is_dropped(part):
            continue  # vLLM leaves it out of the prompt
        # A tool may describe a format by an example, which never changes.
        severity = Severity.INFO if part.region is Region.TOOLS else Severity.WARNING
        for path, text in _strings(part.path, part.content):
            for rule, excerpt in _matches(text):
                message = f"{rule.words}: {excerpt!r}; move it into the latest message"
                yield Finding(rule.name, severity, path, message, call.source)
                if worst is None and severity is Severity.WARNING:
                    worst = part
        if worst is not None and part.mark is not None:
            yield _covered(call, part, worst)
            return
    if worst is None:
        return
    for part in call.request.parts:
        if part.region is Region.MESSAGES and part.mark is not None:
            yield _covered(call, part, worst)
            return


def _covered(call: Call, part: Part, volatile: Part) -> Finding:
    assert part.mark is not None
    return Finding(
        "breakpoint_after_volatile",
        Severity.WARNING,
        part.mark.path,
        f"covers {volatile.path}, which is volatile: what it writes is never read; put a "
        "breakpoint before it, or move it",
        call.source,
    )


def _matches(text: str) -> Iterator[tuple[Rule, str]]:
    text = text[:_MAX_SCAN]
    taken: list[tuple[int, int]] = []
    for rule in RULES:
        count = 0
        for match in rule.pattern.finditer(text):
            start, end = match.span()
            if any(start < b and a < end for a, b in taken):
                continue
            taken.append((start, end))
            yield rule, text[start : min(end, start + _EXCERPT)]
            count += 1
            if count == _MAX_PER_STRING:
                break


def _strings(path: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield the strings inside a JSON value with their paths, without recursion."""
    if isinstance(value, Mapping) and set(value) == {"type", "text"}:
        value = value["text"]
    stack, seen = [(path, value)], 0
    while stack and seen < _MAX_LEAVES:
        where, item = stack.pop()
        seen += 1
        if isinstance(item, str):
            yield where, item
        elif isinstance(item, Mapping):
            stack += [(f"{where}.{key}", inner) for key, inner in reversed(list(item.items()))]
        elif isinstance(item, list):
            room = _MAX_LEAVES - seen
            stack += reversed([(f"{where}[{i}]", inner) for i, inner in enumerate(item[:room])])


def _key_order(
    call: Call, fingerprint: Fingerprinter, known: dict[tuple[str, bytes], bytes]
) -> Iterator[Finding]:
    """Find tools that came before with the same content and their keys in another order."""
    unsorted: list[str] = []
    for part in call.request.parts:
        if part.region is not Region.TOOLS:
            break
        tool = fingerprint.tool(part.content, fingerprint.hash(_dump(part.content)))
        first = known.setdefault((tool.name, tool.unordered), tool.ordered)
        if first != tool.ordered:
            yield Finding(
                "unsorted_json",
                Severity.WARNING,
                part.path,
                f"{tool.name} has its keys in another order than before; sort them",
                call.source,
            )
        elif not _is_sorted(part.content):
            unsorted.append(tool.name)
    if unsorted:
        names = ", ".join(unsorted[:3]) + (", …" if len(unsorted) > 3 else "")
        yield Finding(
            "unsorted_json",
            Severity.INFO,
            "tools",
            f"keys of {len(unsorted)} tools are not sorted ({names}); harmless as long as their "
            "order never changes",
            call.source,
        )


def _tool_order(
    call: Call,
    fingerprint: Fingerprinter,
    orders: dict[tuple[str | None, frozenset[str]], list[str]],
) -> Iterator[Finding]:
    parts = [part for part in call.request.parts if part.region is Region.TOOLS]
    names = [
        fingerprint.tool(part.content, fingerprint.hash(_dump(part.content))).name for part in parts
    ]
    before = orders.setdefault((call.session, frozenset(names)), names)
    if before != names and sorted(before) == sorted(names):
        at = next(i for i, (a, b) in enumerate(zip(before, names, strict=True)) if a != b)
        yield Finding(
            "tool_order",
            Severity.WARNING,
            parts[at].path,
            f"{names[at]} stands where {before[at]} stood before; sort the tools by name",
            call.source,
        )


def _dump(value: Any) -> bytes:
    return json.dumps(value).encode()


def _is_sorted(value: Any) -> bool:
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, Mapping):
            keys = list(item)
            if keys != sorted(keys):
                return False
            stack += item.values()
        elif isinstance(item, list):
            stack += item
    return True


def add_command(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``lint`` to the command line; ``run(args)`` of the parsed arguments runs it."""
    parser = subparsers.add_parser(
        "lint",
        help="find what will break the prefixes of recorded requests",
        description="Look for volatile content in the tools and system prompts of recorded "
        "requests. Exit code: 0; 1 if there is any warning; 2 if the file cannot be read.",
    )
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="JSON lines of requests, as for explain"
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run ``cachescope lint`` and return its exit code."""
    try:
        traffic = read_traffic(args.file)
        calls = [call for call in traffic if isinstance(call, Call)]
        if len(calls) < len(traffic):
            raise TrafficError(f"{args.file}: holds hashes of blocks, and no text to look at")
    except (OSError, TrafficError) as error:
        print(f"cachescope lint: {error}", file=sys.stderr)
        return 2
    findings = lint(calls)
    if args.json:
        plain = [{**asdict(f), "severity": f.severity.name.lower()} for f in findings]
        print(json.dumps({"requests": len(calls), "findings": plain}, indent=2))
    else:
        console = Console()
        # As for explain: a closed pipe is for the caller to deal with.
        with console.capture() as rendered:
            render(findings, len(calls), console)
        print(rendered.get(), end="")
    return int(any(finding.severity is Severity.WARNING for finding in findings))


def render(findings: list[Finding], requests: int, console: Console) -> None:
    """Print the findings, a line each."""
    for finding in findings:
        warning = finding.severity is Severity.WARNING
        line = Text(f"{finding.source}  ")
        line.append(finding.rule, style="bold red" if warning else "yellow")
        line.append(f" at {finding.path}: {finding.message}")
        if finding.requests > 1:
            line.append(f" ({finding.requests} requests)")
        console.print(line, highlight=False, soft_wrap=True)
    warnings = sum(finding.severity is Severity.WARNING for finding in findings)
    console.print(f"{requests:,} requests, {warnings} warnings, {len(findings) - warnings} notes.")
