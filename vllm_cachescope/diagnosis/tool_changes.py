"""Changes of tools between two requests."""

from collections import Counter
from collections.abc import Iterator, Sequence

from vllm_cachescope.diagnosis.alignment import ascending
from vllm_cachescope.diagnosis.changes import ABSENT, MAX_CHANGES, PRESENT, Change, ChangeKind
from vllm_cachescope.diagnosis.fingerprint import HASH_BYTES, Fingerprint, ToolFingerprint
from vllm_cachescope.diagnosis.namespace import named

_VALUE_BYTES = 8 * HASH_BYTES


def tool_changes(old: Fingerprint, new: Fingerprint) -> Iterator[Change]:
    """Yield the tools that were added, those removed, those that changed places, and those edited.

    Tools are told apart by name, so that an edit is not taken for a removal and an addition.
    """
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
            value=PRESENT,
            old_value=ABSENT,
        )
    if removed:
        yield Change(
            ChangeKind.TOOLS_REMOVED,
            old.path(removed[0]),
            old.start(removed[0]),
            names=tuple(old.tools[i].name for i in removed[:MAX_CHANGES]),
            chars_before=sum(old.chars[i] for i in removed),
            parts_before=len(removed),
            value=ABSENT,
            old_value=PRESENT,
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
    """Index tools by name and by how many of that name came before."""
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
    kind = ChangeKind.TOOL_KEYS_REORDERED
    names: tuple[str, ...] = (after.name,)
    fields: tuple[str, ...] = ()
    if before.unordered != after.unordered:
        theirs, ours = before.field_map(), after.field_map()
        kind = ChangeKind.TOOL_CHANGED
        differing = (name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name))
        names, fields = named(after.name, differing)
    return Change(
        kind,
        new.path(at),
        new.start(at),
        names=names[:MAX_CHANGES],
        fields=fields,
        chars_before=old.chars[i],
        chars_after=new.chars[at],
        parts_before=1,
        parts_after=1,
        part_before=i,
        value=after.ordered,
        old_value=before.ordered,
    )
