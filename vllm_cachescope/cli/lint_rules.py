"""The rules of ``cachescope lint``: what breaks a prefix, or may break it.

A value that is different in every request (a time, a UUID, a nonce) makes everything after it
unreadable from the cache. In the tools or the system prompt that is nearly the whole prompt, so
these two are searched; a message stays as it was sent. Of a prompt that is one text, the head is
taken for the system prompt.
"""

import re
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

from vllm_cachescope.cli.changing_system import ChangingSystem
from vllm_cachescope.cli.findings.rules import RULES
from vllm_cachescope.cli.steady_values import SteadyValues
from vllm_cachescope.cli.stuck_breakpoints import StuckBreakpoints
from vllm_cachescope.cli.traffic import Call
from vllm_cachescope.cli.volatile import Rule, volatile_values
from vllm_cachescope.diagnosis.fingerprint import ToolFingerprint
from vllm_cachescope.diagnosis.fingerprinter import Fingerprinter
from vllm_cachescope.prompt.ignored_marker import IgnoredReason
from vllm_cachescope.prompt.request import Part, Protocol, Region
from vllm_cachescope.wire.billing_header import is_dropped

_MAX_SCAN = 200_000  # characters of one string that are looked at
_MAX_VALUES = 10_000  # values of one part that are looked at
_MAX_TOOLS = 512  # tools that are compared; of more, a fingerprint takes the last ones as one
_MAX_ORDERS = 64  # orders of tools that others are compared with
_EXCERPT = 48  # characters of a value that a message shows

_HEAD = 2000  # leading characters of a prompt without turns that count as its system prompt
_FIRST_USER = re.compile(r"(?:\A|\n\n)user: ")  # as in `traffic.text_request`


class Severity(IntEnum):
    """How bad a finding is: INFO may be meant that way, WARNING costs cache hits."""

    INFO = 0
    WARNING = 1


@dataclass(frozen=True, slots=True)
class Finding:
    """A place in the requests that will break a prefix, or may break one.

    Attributes:
        rule: the name of one of `RULES`: ``uuid``, ``tool_order``, ``stuck_breakpoint``.
        severity: whether it will break a prefix (WARNING) or may (INFO).
        path: where in the request, as in ``system[1]``.
        message: what stands there, with an excerpt, and what to do.
        source: file and line of the first request that has it, as in ``traffic.jsonl:12``.
        requests: how many requests have it.
    """

    rule: str
    severity: Severity
    path: str
    message: str
    source: str
    requests: int = 1

    @property
    def code(self) -> str:
        """The stable code of its rule."""
        return RULES[self.rule].code


@dataclass(slots=True)
class _Seen:
    """What earlier requests had: it tells values that change from values that only look volatile.

    Attributes:
        tools: each tool's JSON as it was first sent, by its name and its JSON with sorted keys.
        lists: the order of each list of strings in a tool, by the tool's name, the path in it and
            what is in the list.
        values: the volatile values of each string in a tool, by the tool's name and the path in it.
        orders: the orders in which tools came; with each, two tools that stood the other way round
            in an order before it, or None.
    """

    tools: dict[tuple[str, bytes], bytes] = field(default_factory=dict)
    lists: dict[tuple[str, str, tuple[str, ...]], list[str]] = field(default_factory=dict)
    values: dict[tuple[str, str], tuple[tuple[Rule, str], ...]] = field(default_factory=dict)
    orders: dict[tuple[str, ...], tuple[str, str] | None] = field(default_factory=dict)


def lint(calls: Iterable[Call]) -> list[Finding]:
    """Return the findings in ``calls``, warnings first, one for each rule and path."""
    fingerprint = Fingerprinter(secrets.token_bytes(32))
    seen = _Seen()
    found: dict[tuple[str, str], Finding] = {}
    times: Counter[tuple[str, str]] = Counter()
    system, stuck = ChangingSystem(), StuckBreakpoints()
    calls = list(calls)
    steady = SteadyValues(_system_texts(calls))
    for call in calls:
        system.see(call)
        stuck.see(call)
        tools = _tools(call, fingerprint)
        findings = [
            *_volatile(call, tools, seen, steady),
            *_volatile_head(call),
            *_json_order(call, tools, seen),
            *_tool_order(call, tools, seen),
            *_ignored(call),
        ]
        times.update({(finding.rule, finding.path) for finding in findings})
        for finding in findings:
            key = (finding.rule, finding.path)
            known = found.setdefault(key, finding)
            if finding.severity > known.severity:
                found[key] = finding
    for finding in (*_changing(system), *_stuck(stuck)):
        found.setdefault((finding.rule, finding.path), finding)
        times[finding.rule, finding.path] += finding.requests
    counted = [replace(finding, requests=times[key]) for key, finding in found.items()]
    return sorted(counted, key=lambda finding: -finding.severity)


def _changing(system: ChangingSystem) -> Iterator[Finding]:
    """Find system blocks that no two requests share, whatever it is that changes in them."""
    for path, source, requests in system.found():
        message = "differs in each request; move what changes into the latest message"
        yield Finding("changing_system", Severity.WARNING, path, message, source, requests)


def _stuck(stuck: StuckBreakpoints) -> Iterator[Finding]:
    """Find breakpoints that stay where they are while the conversation grows."""
    for path, source, requests in stuck.found():
        message = "stays there while the conversation grows, which is computed again in each turn; "
        message += "put a breakpoint on the latest message, too"
        yield Finding("stuck_breakpoint", Severity.WARNING, path, message, source, requests)


def _system_texts(calls: Iterable[Call]) -> Iterator[tuple[tuple[str, str], str]]:
    """Yield the texts of all system prompts, each with its model and its path."""
    for call in calls:
        for part in call.request.parts:
            if part.region is Region.SYSTEM:
                for path, text in _strings(part.path, part.content):
                    yield (call.request.model, path), text[:_MAX_SCAN]


def _tools(call: Call, fingerprint: Fingerprinter) -> list[tuple[Part, ToolFingerprint]]:
    parts = [part for part in call.request.parts if part.region is Region.TOOLS][:_MAX_TOOLS]
    tools = fingerprint(replace(call.request, parts=tuple(parts))).tools
    return list(zip(parts, tools, strict=True))


def _volatile(
    call: Call,
    tools: list[tuple[Part, ToolFingerprint]],
    seen: _Seen,
    steady: SteadyValues,
) -> Iterator[Finding]:
    names = {part.path: tool.name for part, tool in tools}
    worst: Part | None = None
    for part in call.request.parts:
        if part.region is Region.MESSAGES:
            break
        if call.request.protocol is Protocol.MESSAGES and is_dropped(part):
            continue  # vLLM leaves it out of the prompt
        for path, text in _strings(part.path, part.content):
            values = volatile_values(text[:_MAX_SCAN])
            # A tool may describe a format by an example: only a value that changes is a warning.
            constant = values if part.region is Region.TOOLS else ()
            if part.path in names:
                inside = path.removeprefix(part.path)
                constant = seen.values.setdefault((names[part.path], inside), values)
            about, text = (call.request.model, path), text[:_MAX_SCAN]
            for value in values:
                meant = value in constant or (
                    part.region is Region.SYSTEM and steady.has(about, text, value[1])
                )
                severity = Severity.INFO if meant else Severity.WARNING
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
    """Find volatile text at the head of the prompt of a Completions request."""
    if call.request.protocol is not Protocol.COMPLETIONS:
        return
    for part in call.request.parts:
        if part.path == "prompt":
            for path, text in _strings(part.path, part.content):
                for value in volatile_values(_head(text[:_MAX_SCAN])):
                    yield _found(call, path, value, Severity.WARNING)


def _head(prompt: str) -> str:
    """Return the text before the user's first turn; if there is none, `_HEAD` characters."""
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


def _ignored(call: Call) -> Iterator[Finding]:
    """Find markers that a server ignores."""
    for marker in call.request.ignored:
        # A conversation carries its old markers along, and only the latest count.
        usual = marker.reason is IgnoredReason.TOO_MANY
        severity = Severity.INFO if usual else Severity.WARNING
        message = f"{marker.reason.words} ({marker.reason.value})"
        yield Finding("ignored_marker", severity, marker.path, message, call.source)


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
