"""``cachescope lint``: finds what will break a prefix before it costs anything.

A value that is different in every request (a time, a UUID, a nonce) makes everything after it
unreadable from the cache. In tools and system prompts that is nearly the whole prompt, so that is
where it is looked for; a message keeps what it said. Of a prompt that is one text, its head is
taken for the system prompt.
"""

import argparse
import json
import re
import secrets
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import IntEnum
from functools import lru_cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from vllm_cachescope.cli.console import show
from vllm_cachescope.cli.traffic import Call, TrafficError, read_traffic
from vllm_cachescope.diagnosis.fingerprint import ToolFingerprint
from vllm_cachescope.diagnosis.fingerprinter import Fingerprinter
from vllm_cachescope.prompt.request import Part, Protocol, Region
from vllm_cachescope.wire.billing_header import is_dropped

_MAX_SCAN = 200_000  # characters of one string that are looked at
_MAX_VALUES = 10_000  # values of one part that are looked at
_MAX_TOOLS = 512  # tools that are compared; of more, a fingerprint takes the last ones as one
_MAX_ORDERS = 64  # orders of tools that others are compared with
_MAX_PER_STRING = 5
_EXCERPT = 48

_HEAD = 2000  # leading characters of a prompt without turns that count as its system prompt
_FIRST_USER = re.compile(r"(?:\A|\n\n)user: ")  # as in `traffic.text_request`
_BEFORE = 40  # characters in front of a value, on its line, that may say what it is

# Spaces as JavaScript writes them into a time of day are no breaks.
_SPACE = "[ \u00a0\u202f]"
_YEAR, _MONTH, _DAY = r"(?:20\d\d)", r"(?:0?[1-9]|1[0-2])", r"(?:0?[1-9]|[12]\d|3[01])"
_HOUR, _MINUTE = r"(?:[01]?\d|2[0-3])", r"[0-5]\d"
_ORDINAL = r"\d{1,2}(?:st|nd|rd|th)?"
_MONTH_NAME = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?"
    r"|sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\.?"
)
_WEEKDAY = r"(?:mon|tue(?:s)?|wed(?:nes)?|thu(?:rs)?|fri|sat(?:ur)?|sun)(?:day)?\.?"


class Severity(IntEnum):
    """INFO may be meant so; WARNING costs cache hits."""

    INFO = 0
    WARNING = 1


@dataclass(frozen=True, slots=True)
class Rule:
    """A kind of volatile text.

    Attributes:
        name: its name.
        words: what it is called in a message.
        pattern: how it looks.
        after: what has to stand before it, within `_BEFORE` characters of its line; None for
            anything.
        unless: what may not.
    """

    name: str
    words: str
    pattern: "re.Pattern[str]"
    after: "re.Pattern[str] | None" = None
    unless: "re.Pattern[str] | None" = None


def _pattern(*alternatives: str) -> "re.Pattern[str]":
    """Return a pattern for any of ``alternatives``, in any case, as whole words.

    Words are of ASCII: Chinese and Japanese leave no space before a date.
    """
    return re.compile(rf"\b(?:{'|'.join(alternatives)})(?!\w)", re.ASCII | re.IGNORECASE)


# Whether a time of day is now, or eight digits are a date, only the words before it can say.
_NOW = re.compile(
    r"\b(?:now|current|currently|today|date|datetime|timestamp|epoch|clock|started|generated"
    r"|created|updated|as of|it is|it's|time(?!\s?(?:limit|out|frame|span|zone)))\b"
    r"(?!.*\b(?:such as|e\.g\.|example|format|like)(?!\w))",
    re.IGNORECASE,
)
_CONSTANT = re.compile(
    r"(?:version\W{0,4}|\b(?:gpt|claude)[\w.-]{0,32}-)\Z", re.ASCII | re.IGNORECASE
)
_CLOCK, _DATE = ("timestamp", "a point in time"), ("date", "an absolute date")
_NONCE = ("nonce", "a nonce or random id")

# In this order: a date inside a timestamp, or hex digits inside a UUID, are not found again. All
# repetitions are bounded, and all patterns start at the start of a word.
RULES = (
    Rule("uuid", "a UUID", _pattern(r"[\da-f]{8}-(?:[\da-f]{4}-){3}[\da-f]{12}")),
    Rule(
        *_CLOCK,
        _pattern(
            rf"{_YEAR}([-/.])\d\d\1\d\d[T ]\d\d:\d\d(?::\d\d(?:[.,]\d{{1,9}})?)?Z?",
            rf"{_YEAR}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])[T_-]{_HOUR}{_MINUTE}"
            rf"(?:{_MINUTE}(?:[.,]\d{{1,9}})?)?Z?",
            # On the full or half hour it may be anybody's office hours.
            rf"(?:0?\d|1[0-2]):(?![03]0{_SPACE}?[ap]){_MINUTE}(?::{_MINUTE})?{_SPACE}?[ap]\.?m",
            # Seconds, milli-, micro- and nanoseconds since 1970.
            r"1[6-9]\d{8}|1[5-9]\d{11}(?:\d{3}){0,2}",
        ),
    ),
    Rule(
        *_CLOCK,
        _pattern(rf"{_HOUR}:{_MINUTE}(?::{_MINUTE}(?:[.,]\d{{1,9}})?)?", r"1[4-9]\d{8}"),
        after=_NOW,
    ),
    Rule(
        *_DATE,
        _pattern(
            rf"{_YEAR}([-/.]){_MONTH}\1{_DAY}(?!\.\d)",
            rf"{_MONTH}([-/.]){_DAY}\2{_YEAR}",
            rf"{_DAY}([-/.]){_MONTH}\3{_YEAR}",
            rf"{_MONTH}/{_DAY}/[23]\d(?!/)",
            rf"{_DAY}/{_MONTH}/[23]\d(?!/)",
            rf"{_YEAR} ?年 ?{_MONTH} ?月 ?{_DAY} ?日",
            rf"{_MONTH_NAME} {_ORDINAL},? {_YEAR}",
            rf"{_ORDINAL}\.?(?:-| (?:of )?){_MONTH_NAME}(?:-|,? ){_YEAR}",
            rf"{_WEEKDAY},? {_MONTH_NAME} {_ORDINAL}",
            rf"{_WEEKDAY},? {_ORDINAL}\.? (?:of )?{_MONTH_NAME}",
        ),
        unless=_CONSTANT,
    ),
    Rule(*_DATE, _pattern(r"20\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])"), after=_NOW),
    Rule(
        *_NONCE,
        # A value with a digit and a letter, or many digits; the type of one is none.
        re.compile(
            r"(?<![A-Za-z])(?i:(?:nonce|cch|salt|(?:conversation|correlation|invocation|request|run"
            r"|session|span|thread|trace|transaction)[-_ ]?id)\b[\"']?\s{0,3}(?:[:=>]|\bis\b)"
            r"\s{0,3}[\"']?(?!(?:u?int|float|sha|md|base|utf|uuid|v)-?\d{1,3}\b|\d{1,2}-[a-z]+\b))"
            r"(?:(?=[\w-]{0,63}\d)(?=[\w-]{0,63}[A-Za-z])[\w-]{4,64}|\d{6,64}\b)",
            re.ASCII,
        ),
    ),
    Rule(
        *_NONCE,
        re.compile(
            r"\b(?=[0-9a-f]{0,63}\d)(?=[0-9a-f]{0,63}[a-f])[0-9a-f]{16,64}\b"
            r"|\b(?=[0-9A-F]{0,63}\d)(?=[0-9A-F]{0,63}[A-F])[0-9A-F]{32,64}\b"
            r"|\b0x(?=[0-9A-Fa-f]{0,15}\d)(?=[0-9A-Fa-f]{0,15}[A-Fa-f])[0-9A-Fa-f]{9,16}\b"
            # ULIDs, and ids as the servers of language models give them.
            r"|\b[0-7](?=\d{0,24}[A-Z])[0-9A-HJKMNP-TV-Z]{25}\b"
            r"|\b(?:req|msg|resp|chatcmpl|toolu|call|run|thread|sess|session|conv|batch|trace)[_-]"
            r"(?=[A-Za-z]{0,63}\d)(?=[a-z\d]{0,63}[A-Z])[A-Za-z\d]{10,64}\b"
            r"|/tmp/tmp(?:[a-z0-9_]{8}|\.[A-Za-z0-9]{10})\b",
            re.ASCII,
        ),
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


@dataclass(slots=True)
class _Seen:
    """What earlier requests had, to tell what changes from what only looks as if it might.

    Attributes:
        tools: each tool's JSON as it was first sent, by its name and its JSON with sorted keys.
        lists: the order of each list of strings in a tool, by the tool's name, the path in it and
            what is in the list.
        values: the volatile values of each string in a tool, by the tool's name and the path in it.
        orders: the orders in which tools came, with the two that had changed places by then.
    """

    tools: dict[tuple[str, bytes], bytes] = field(default_factory=dict)
    lists: dict[tuple[str, str, tuple[str, ...]], list[str]] = field(default_factory=dict)
    values: dict[tuple[str, str], tuple[tuple[Rule, str], ...]] = field(default_factory=dict)
    orders: dict[tuple[str, ...], tuple[str, str] | None] = field(default_factory=dict)


def lint(calls: Iterable[Call]) -> list[Finding]:
    """Return what is found in the calls, the worst first, each finding once per place."""
    fingerprint = Fingerprinter(secrets.token_bytes(32))
    seen = _Seen()
    found: dict[tuple[str, str], Finding] = {}
    times: Counter[tuple[str, str]] = Counter()
    for call in calls:
        tools = _tools(call, fingerprint)
        findings = [
            *_volatile(call, tools, seen),
            *_volatile_head(call),
            *_json_order(call, tools, seen),
            *_tool_order(call, tools, seen),
        ]
        times.update({(finding.rule, finding.path) for finding in findings})
        for finding in findings:
            key = (finding.rule, finding.path)
            known = found.setdefault(key, finding)
            if finding.severity > known.severity:
                found[key] = finding
    counted = [replace(finding, requests=times[key]) for key, finding in found.items()]
    return sorted(counted, key=lambda finding: -finding.severity)


def _tools(call: Call, fingerprint: Fingerprinter) -> list[tuple[Part, ToolFingerprint]]:
    parts = [part for part in call.request.parts if part.region is Region.TOOLS][:_MAX_TOOLS]
    tools = fingerprint(replace(call.request, parts=tuple(parts))).tools
    return list(zip(parts, tools, strict=True))


def _volatile(
    call: Call, tools: list[tuple[Part, ToolFingerprint]], seen: _Seen
) -> Iterator[Finding]:
    names = {part.path: tool.name for part, tool in tools}
    worst: Part | None = None
    for part in call.request.parts:
        if part.region is Region.MESSAGES:
            break
        if call.request.protocol is Protocol.MESSAGES and is_dropped(part):
            continue  # vLLM leaves it out of the prompt
        for path, text in _strings(part.path, part.content):
            values = _matches(text[:_MAX_SCAN])
            # A tool may describe a format by an example, which never changes.
            constant = values if part.region is Region.TOOLS else ()
            if part.path in names:
                inside = path.removeprefix(part.path)
                constant = seen.values.setdefault((names[part.path], inside), values)
            for value in values:
                severity = Severity.INFO if value in constant else Severity.WARNING
                yield _found(call, path, value, severity)
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


def _volatile_head(call: Call) -> Iterator[Finding]:
    """Find volatile text at the head of a Completions request's prompt."""
    if call.request.protocol is not Protocol.COMPLETIONS:
        return
    for part in call.request.parts:
        if part.path == "prompt":
            for path, text in _strings(part.path, part.content):
                for value in _matches(_head(text[:_MAX_SCAN])):
                    yield _found(call, path, value, Severity.WARNING)


def _head(prompt: str) -> str:
    """Return what precedes the first turn of the user; `_HEAD` characters if there is none."""
    user = _FIRST_USER.search(prompt)
    return prompt[: user.start()] if user else prompt[:_HEAD]


def _found(call: Call, path: str, value: tuple[Rule, str], severity: Severity) -> Finding:
    rule, text = value
    message = f"{rule.words}: {text[:_EXCERPT]!r}; move it into the latest message"
    return Finding(rule.name, severity, path, message, call.source)


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


# A request repeats the tools and the system prompt of the one before.
@lru_cache(maxsize=512)
def _matches(text: str) -> tuple[tuple[Rule, str], ...]:
    """Return what is volatile in a text, each with its rule."""
    found: list[tuple[Rule, str]] = []
    taken: list[tuple[int, int]] = []
    for rule in RULES:
        count = 0
        for match in rule.pattern.finditer(text):
            start, end = match.span()
            if any(start < b and a < end for a, b in taken) or not _fits(rule, text, start):
                continue
            taken.append((start, end))
            found.append((rule, match[0]))
            count += 1
            if count == _MAX_PER_STRING:
                break
    return tuple(found)


def _fits(rule: Rule, text: str, start: int) -> bool:
    """Whether what stands before ``start`` on its line lets it be what ``rule`` finds."""
    before = text[max(0, start - _BEFORE) : start].rpartition("\n")[2]
    return (rule.after is None or rule.after.search(before) is not None) and (
        rule.unless is None or rule.unless.search(before) is None
    )


def _strings(path: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield the strings inside a JSON value with their paths."""
    if isinstance(value, Mapping) and set(value) == {"type", "text"}:
        value = value["text"]
    for where, item in _walk(path, value):
        if isinstance(item, str):
            yield where, item


def _walk(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield all values inside a JSON value with their paths, without recursion."""
    stack, seen = [(path, value)], 0
    while stack and seen < _MAX_VALUES:
        where, item = stack.pop()
        seen += 1
        yield where, item
        if isinstance(item, Mapping):
            stack += [(f"{where}.{key}", inner) for key, inner in reversed(list(item.items()))]
        elif isinstance(item, list):
            room = _MAX_VALUES - seen
            stack += reversed([(f"{where}[{i}]", inner) for i, inner in enumerate(item[:room])])


def _json_order(
    call: Call, tools: list[tuple[Part, ToolFingerprint]], seen: _Seen
) -> Iterator[Finding]:
    """Find tools that came before with the same content in another order."""
    unsorted: list[str] = []
    for part, tool in tools:
        first = seen.tools.setdefault((tool.name, tool.unordered), tool.ordered)
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
        for path, item in _walk(part.path, part.content):
            if not _is_list_of_strings(item):
                continue
            inside = path.removeprefix(part.path)
            if seen.lists.setdefault((tool.name, inside, tuple(sorted(item))), item) != item:
                yield Finding(
                    "unsorted_json",
                    Severity.WARNING,
                    path,
                    f"a list of {tool.name} comes in another order than before; sort it",
                    call.source,
                )
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


def _is_list_of_strings(item: Any) -> bool:
    return (
        isinstance(item, list)
        and 1 < len(item) < _MAX_VALUES
        and all(isinstance(inner, str) for inner in item)
    )


def _tool_order(
    call: Call, tools: list[tuple[Part, ToolFingerprint]], seen: _Seen
) -> Iterator[Finding]:
    """Find tools that stand in another order than in an earlier request of any session."""
    names = tuple(dict.fromkeys(tool.name for _, tool in tools))
    if names in seen.orders:
        moved = seen.orders[names]
    else:
        moved = next((m for before in seen.orders if (m := _moved(before, names))), None)
        if len(seen.orders) < _MAX_ORDERS:
            seen.orders[names] = moved
    if moved is not None:
        name, other = moved
        yield Finding(
            "tool_order",
            Severity.WARNING,
            next(part.path for part, tool in tools if tool.name == name),
            f"{name} stands before {other}, and came after it before; sort the tools by name",
            call.source,
        )


def _moved(before: tuple[str, ...], names: tuple[str, ...]) -> tuple[str, str] | None:
    """Return two tools that changed places; None if none did, or these are other tools."""
    common = set(before) & set(names)
    if 2 * len(common) < len({*before, *names}):
        return None
    ours, theirs = ([n for n in order if n in common] for order in (names, before))
    return next(((a, b) for a, b in zip(ours, theirs, strict=True) if a != b), None)


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
        show(lambda console: render(findings, len(calls), console))
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
