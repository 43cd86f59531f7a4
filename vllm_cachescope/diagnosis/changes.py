"""What differs between two fingerprints, change by change."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import chain, islice

from vllm_cachescope.diagnosis.fingerprint import (
    HASH_BYTES,
    Fingerprint,
    MarkFingerprint,
    ToolFingerprint,
)
from vllm_cachescope.diagnosis.prefix_match import (
    ROUTING_PARAMS,
    ascending,
    common_items,
    common_pieces,
    compaction,
    gaps,
    is_front,
    split,
)
from vllm_cachescope.durations import format_duration
from vllm_cachescope.prompt.request import Region
from vllm_cachescope.tenancy.scope import Scope

MAX_CHANGES = 100
"""A comparison lists at most this many changes, earliest first."""

_VALUE_BYTES = 8 * HASH_BYTES
_PRESENT, _ABSENT = b"+", b"-"


class ChangeKind(StrEnum):
    """What differs between a request and its ancestor."""

    MODEL = "model_changed"
    PARAM_ADDED = "param_added"
    PARAM_REMOVED = "param_removed"
    PARAM_CHANGED = "param_changed"
    TOOLS_ADDED = "tools_added"
    TOOLS_REMOVED = "tools_removed"
    TOOLS_REORDERED = "tools_reordered"
    TOOL_CHANGED = "tool_changed"
    TOOL_KEYS_REORDERED = "tool_keys_reordered"
    SYSTEM_ADDED = "system_added"
    SYSTEM_REMOVED = "system_removed"
    SYSTEM_CHANGED = "system_changed"
    SYSTEM_REORDERED = "system_reordered"
    MESSAGES_ADDED = "messages_added"
    MESSAGES_REMOVED = "messages_removed"
    MESSAGES_CHANGED = "messages_changed"
    MESSAGES_REORDERED = "messages_reordered"
    HISTORY_COMPACTED = "history_compacted"
    MARK_ADDED = "mark_added"
    MARK_REMOVED = "mark_removed"
    TTL_CHANGED = "ttl_changed"
    SCOPE_CHANGED = "scope_changed"

    @property
    def area(self) -> str:
        """One of ``model``, ``params``, ``tools``, ``system``, ``messages`` and ``markers``."""
        return _AREAS[self]


_AREAS = {
    ChangeKind.MODEL: "model",
    ChangeKind.PARAM_ADDED: "params",
    ChangeKind.PARAM_REMOVED: "params",
    ChangeKind.PARAM_CHANGED: "params",
    ChangeKind.TOOLS_ADDED: "tools",
    ChangeKind.TOOLS_REMOVED: "tools",
    ChangeKind.TOOLS_REORDERED: "tools",
    ChangeKind.TOOL_CHANGED: "tools",
    ChangeKind.TOOL_KEYS_REORDERED: "tools",
    ChangeKind.SYSTEM_ADDED: "system",
    ChangeKind.SYSTEM_REMOVED: "system",
    ChangeKind.SYSTEM_CHANGED: "system",
    ChangeKind.SYSTEM_REORDERED: "system",
    ChangeKind.MESSAGES_ADDED: "messages",
    ChangeKind.MESSAGES_REMOVED: "messages",
    ChangeKind.MESSAGES_CHANGED: "messages",
    ChangeKind.MESSAGES_REORDERED: "messages",
    ChangeKind.HISTORY_COMPACTED: "messages",
    ChangeKind.MARK_ADDED: "markers",
    ChangeKind.MARK_REMOVED: "markers",
    ChangeKind.TTL_CHANGED: "markers",
    ChangeKind.SCOPE_CHANGED: "markers",
}


@dataclass(frozen=True, slots=True)
class Change:
    """One difference.

    Attributes:
        kind: what differs.
        path: where in the client's body; for something removed, where it stood before.
        token: estimated tokens of the prompt before it.
        names: the tools or parameters it is about.
        fields: for a changed tool, which of its fields.
        before: the old model, lifetime or scope, in words.
        after: the new one.
        chars_before: characters that were there, of a part or a run of parts.
        chars_after: characters that are there now.
        parts_before: how many parts were there.
        parts_after: how many parts are there now.
        value: a hash of the new value, to notice a value that comes back.
        old_value: a hash of the old one.
    """

    kind: ChangeKind
    path: str
    token: int
    names: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    before: str | None = None
    after: str | None = None
    chars_before: int | None = None
    chars_after: int | None = None
    parts_before: int = 0
    parts_after: int = 0
    value: bytes = field(default=b"", repr=False)
    old_value: bytes = field(default=b"", repr=False)

    @property
    def area(self) -> str:
        """What is changed, as in `ChangeKind.area`."""
        return self.kind.area

    def __str__(self) -> str:
        """Say it in a line: ``tool_changed at tools[7]: Bash (description), 9 → 12 characters``."""
        about = ", ".join(self.names)
        if self.fields:
            about += f" ({', '.join(self.fields)})"
        details = [about] if about and about != self.path else []
        if self.before is not None or self.after is not None:
            details.append(f"{self.before or 'none'} → {self.after or 'none'}")
        if self.chars_before is not None or self.chars_after is not None:
            details.append(f"{self.chars_before or 0:,} → {self.chars_after or 0:,} characters")
        line = f"{self.kind} at {self.path}"
        return f"{line}: {', '.join(details)}" if details else line

    @property
    def rekeys(self) -> bool:
        """Whether blocks have other keys from here on, even where their tokens are the same."""
        return self.kind is ChangeKind.SCOPE_CHANGED or "cache_salt" in self.names

    @property
    def diverges(self) -> bool:
        """Whether the prompts, or the identities of their blocks, part ways here.

        Not so for a breakpoint that moved, a lifetime, or a parameter that only routes.
        """
        if self.area == "params":
            return not ROUTING_PARAMS.issuperset(self.names)
        return self.area != "markers" or self.kind is ChangeKind.SCOPE_CHANGED


def compare(old: Fingerprint, new: Fingerprint) -> tuple[Change, ...]:
    """Return what differs, earliest in the prompt first; then what does not make them diverge.

    Messages that ``new`` has after everything in ``old`` are no difference: a conversation grows.
    """
    # A summary may stand last in the system prompt.
    summary = None if _same_static(old, new) else compaction(old, new)
    if summary:
        texts = iter([_run(ChangeKind.HISTORY_COMPACTED, old, summary[0], new, summary[1])])
    else:
        texts = chain(_system(old, new), _messages(old, new))
    changes = [
        *_model(old, new),
        *_params(old, new),
        *islice(_tools(old, new), MAX_CHANGES),
        *islice(texts, MAX_CHANGES),
        *_marks(old, new),
    ]
    # Stable: at one token, model before parameters before tools and so on.
    changes.sort(key=lambda change: (not change.diverges, change.token))
    return tuple(changes[:MAX_CHANGES])


def _same_static(old: Fingerprint, new: Fingerprint) -> bool:
    return old.counts[:2] == new.counts[:2] and old.static_hashes == new.static_hashes


def compare_whole(old: Fingerprint, new: Fingerprint) -> tuple[Change, ...]:
    """Return what `compare` does, for a request known to begin with all of ``old``'s prompt.

    Only what stands beside the prompt can differ: breakpoints, and parameters that route.
    """
    return (*_params(old, new), *_marks(old, new))


def _model(old: Fingerprint, new: Fingerprint) -> Iterator[Change]:
    if old.model != new.model:
        yield Change(
            ChangeKind.MODEL,
            "model",
            0,
            before=old.model,
            after=new.model,
            value=new.model.encode("utf-8", "surrogatepass"),
            old_value=old.model.encode("utf-8", "surrogatepass"),
        )


def _params(old: Fingerprint, new: Fingerprint) -> Iterator[Change]:
    for name in sorted(old.params.keys() | new.params.keys()):
        before, after = old.params.get(name), new.params.get(name)
        if before == after:
            continue
        if before is None:
            kind = ChangeKind.PARAM_ADDED
        elif after is None:
            kind = ChangeKind.PARAM_REMOVED
        else:
            kind = ChangeKind.PARAM_CHANGED
        token = 0 if is_front(name) else new.start(new.static_parts)
        yield Change(
            kind, name, token, names=(name,), value=after or _ABSENT, old_value=before or _ABSENT
        )


def _tools(old: Fingerprint, new: Fingerprint) -> Iterator[Change]:
    if old.tools == new.tools:
        return
    theirs, ours = _by_name(old.tools), _by_name(new.tools)
    added = [i for name, i in ours.items() if name not in theirs]
    removed = [i for name, i in theirs.items() if name not in ours]
    if added:
        yield Change(
            ChangeKind.TOOLS_ADDED,
            new.path(added[0]),
            new.start(added[0]),
            names=tuple(new.tools[i].name for i in added[:MAX_CHANGES]),
            chars_after=sum(new.chars[i] for i in added),
            parts_after=len(added),
            value=_PRESENT,
            old_value=_ABSENT,
        )
    if removed:
        yield Change(
            ChangeKind.TOOLS_REMOVED,
            old.path(removed[0]),
            old.start(removed[0]),
            names=tuple(old.tools[i].name for i in removed[:MAX_CHANGES]),
            chars_before=sum(old.chars[i] for i in removed),
            parts_before=len(removed),
            value=_ABSENT,
            old_value=_PRESENT,
        )
    common = [(i, theirs[name]) for name, i in ours.items() if name in theirs]
    order = [i for _, i in common]
    kept = set(ascending(order))
    if moved := [k for k in range(len(order)) if k not in kept]:
        first = next(k for k, i in enumerate(sorted(order)) if i != order[k])
        at = common[first][0]
        yield Change(
            ChangeKind.TOOLS_REORDERED,
            new.path(at),
            new.start(at),
            names=tuple(new.tools[common[k][0]].name for k in moved[:MAX_CHANGES]),
            parts_before=len(moved),
            parts_after=len(moved),
            value=new.hashes[: new.counts[0] * HASH_BYTES][-_VALUE_BYTES:],
            old_value=old.hashes[: old.counts[0] * HASH_BYTES][-_VALUE_BYTES:],
        )
    for at, i in common[: 4 * MAX_CHANGES]:
        if change := _tool(old, i, new, at):
            yield change


def _by_name(tools: Sequence[ToolFingerprint]) -> dict[tuple[str, int], int]:
    """Index by name; a name that comes twice is told apart by its occurrence."""
    names = [tool.name for tool in tools]
    if len(set(names)) == len(names):
        return {(name, 0): i for i, name in enumerate(names)}
    seen: Counter[str] = Counter()
    index: dict[tuple[str, int], int] = {}
    for i, name in enumerate(names):
        index[name, seen[name]] = i
        seen[name] += 1
    return index


def _tool(old: Fingerprint, i: int, new: Fingerprint, at: int) -> Change | None:
    before, after = old.tools[i], new.tools[at]
    if before.ordered == after.ordered:
        return None
    kind, fields = ChangeKind.TOOL_KEYS_REORDERED, tuple[str, ...]()
    if before.unordered != after.unordered:
        theirs, ours = before.field_map(), after.field_map()
        kind = ChangeKind.TOOL_CHANGED
        fields = tuple(name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name))
    return Change(
        kind,
        new.path(at),
        new.start(at),
        names=(after.name,),
        fields=fields,
        chars_before=old.chars[i],
        chars_after=new.chars[at],
        parts_before=1,
        parts_after=1,
        value=after.ordered,
        old_value=before.ordered,
    )


def _system(old: Fingerprint, new: Fingerprint) -> Iterator[Change]:
    of_old = range(old.counts[0], old.static_parts)
    of_new = range(new.counts[0], new.static_parts)
    if (at := _reordered(old, new, of_old, of_new)) is not None:
        yield _run(ChangeKind.SYSTEM_REORDERED, old, of_old[at:], new, of_new[at:])
        return
    kinds = (ChangeKind.SYSTEM_ADDED, ChangeKind.SYSTEM_REMOVED, ChangeKind.SYSTEM_CHANGED)
    for gone, came, _ in gaps(old, new, of_old, of_new):
        yield from _edits(old, gone, new, came, kinds)


def _messages(old: Fingerprint, new: Fingerprint) -> Iterator[Change]:
    of_old = range(old.static_parts, len(old))
    of_new = range(new.static_parts, len(new))
    found = list(gaps(old, new, of_old, of_new))
    if _same_static(old, new) and (compacted := compaction(old, new, found)):
        yield _run(ChangeKind.HISTORY_COMPACTED, old, compacted[0], new, compacted[1])
        return
    if (at := _reordered(old, new, of_old, of_new[: len(of_old)])) is not None:
        end = len(of_old)
        yield _run(ChangeKind.MESSAGES_REORDERED, old, of_old[at:], new, of_new[at:end])
        return
    kinds = (ChangeKind.MESSAGES_ADDED, ChangeKind.MESSAGES_REMOVED, ChangeKind.MESSAGES_CHANGED)
    edited = False
    for gone, came, tail in found:
        if tail and not (gone and came):
            continue  # the conversation grew, or goes on from an earlier point
        edited = True
        # What `new` has beyond the edit are the turns that came after it.
        yield from _edits(old, gone, new, came[: len(gone)] if tail else came, kinds)
    at = common_items(old.kinds[of_old.start :], new.kinds[of_new.start :], 1)
    if not edited and at < min(len(of_old), len(of_new)):
        # The same blocks, grouped into other messages.
        i, j = of_old[at], of_new[at]
        yield _run(ChangeKind.MESSAGES_CHANGED, old, range(i, i + 1), new, range(j, j + 1))


def _reordered(old: Fingerprint, new: Fingerprint, of_old: range, of_new: range) -> int | None:
    """Return the offset from which the parts of one list are those of the other, reordered."""
    theirs, ours = split(old, of_old), split(new, of_new)
    # Lists with other sums are not reorderings of each other, which is soon seen.
    if theirs == ours or sum(theirs) != sum(ours) or Counter(theirs) != Counter(ours):
        return None
    return next(k for k, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b)


def _edits(
    old: Fingerprint,
    gone: range,
    new: Fingerprint,
    came: range,
    kinds: tuple[ChangeKind, ChangeKind, ChangeKind],
) -> Iterator[Change]:
    """Yield the changes of one gap: parts replaced one by one, then those added or removed."""
    added, removed, changed = kinds
    pairs = min(len(gone), len(came))
    for k in range(min(pairs, MAX_CHANGES)):
        yield _run(changed, old, gone[k : k + 1], new, came[k : k + 1])
    if len(gone) > pairs:
        yield _run(removed, old, gone[pairs:], new, came[pairs:])
    if len(came) > pairs:
        yield _run(added, old, gone[pairs:], new, came[pairs:])


def _run(kind: ChangeKind, old: Fingerprint, gone: range, new: Fingerprint, came: range) -> Change:
    path = new.path(came.start) if came else old.path(gone.start)
    token = new.start(came.start)
    if len(gone) == len(came) == 1:
        token += common_pieces(old, gone.start, new, came.start) * new.piece_tokens
    return Change(
        kind,
        path,
        token,
        chars_before=sum(old.chars[gone.start : gone.stop]),
        chars_after=sum(new.chars[came.start : came.stop]),
        parts_before=len(gone),
        parts_after=len(came),
        # What is gone is told from what else goes from this place: only the same thing comes back.
        value=new.hashes_of(came[:8]) or _ABSENT + old.hashes_of(gone[:8]),
        old_value=old.hashes_of(gone[:8]) or _ABSENT + new.hashes_of(came[:8]),
    )


def _marks(old: Fingerprint, new: Fingerprint) -> Iterator[Change]:
    theirs, ours = _static_marks(old), _static_marks(new)
    for key in [*theirs, *(key for key in ours if key not in theirs)]:
        before, after = theirs.get(key), ours.get(key)
        if before is None and after is not None:
            yield Change(
                ChangeKind.MARK_ADDED,
                after.path,
                new.start(after.part + 1),
                after=_words(after),
                value=_PRESENT,
                old_value=_ABSENT,
            )
        elif after is None and before is not None:
            part = min(before.part, len(new) - 1)
            yield Change(
                ChangeKind.MARK_REMOVED,
                before.path,
                new.start(part + 1),
                before=_words(before),
                value=_ABSENT,
                old_value=_PRESENT,
            )
        elif before is not None and after is not None:
            yield from _mark(new, before, after)
    if old.ttl_s != new.ttl_s:
        yield Change(
            ChangeKind.TTL_CHANGED,
            "prompt_cache_options.ttl",
            0,
            before=_ttl(old.ttl_s),
            after=_ttl(new.ttl_s),
            value=_ttl(new.ttl_s).encode(),
            old_value=_ttl(old.ttl_s).encode(),
        )


def _static_marks(print_: Fingerprint) -> dict[str, MarkFingerprint]:
    """Index the breakpoints that should stay where they are, and the last one, which moves on."""
    marks: dict[str, MarkFingerprint] = {}
    for mark in print_.marks:
        region = print_.region(mark.part)
        if region is Region.MESSAGES:
            marks["messages"] = mark
        elif region is Region.TOOLS:
            # By name: a tool that moved takes its breakpoint along.
            marks[f"tools.{print_.tools[mark.part].name}"] = mark
        else:
            marks[f"system.{mark.part - print_.counts[0]}"] = mark
    return marks


def _mark(new: Fingerprint, before: MarkFingerprint, after: MarkFingerprint) -> Iterator[Change]:
    if before.scope != after.scope:
        earlier = [mark.part + 1 for mark in new.marks if mark.part < after.part]
        yield Change(
            ChangeKind.SCOPE_CHANGED,
            f"{after.path}.scope",
            # The keys of a whole span change, from the breakpoint before it on.
            new.start(max(earlier, default=0)),
            before=_scope(before.scope),
            after=_scope(after.scope),
            value=_scope(after.scope).encode(),
            old_value=_scope(before.scope).encode(),
        )
    if before.ttl_s != after.ttl_s:
        yield Change(
            ChangeKind.TTL_CHANGED,
            f"{after.path}.ttl",
            new.start(after.part + 1),
            before=_ttl(before.ttl_s),
            after=_ttl(after.ttl_s),
            value=_ttl(after.ttl_s).encode(),
            old_value=_ttl(before.ttl_s).encode(),
        )


def _words(mark: MarkFingerprint) -> str:
    return f"{_ttl(mark.ttl_s)}, {_scope(mark.scope)}"


def _ttl(seconds: int | None) -> str:
    return "default" if seconds is None else format_duration(seconds)


def _scope(scope: Scope | None) -> str:
    return "default" if scope is None else scope.label
