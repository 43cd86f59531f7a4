"""Changes of breakpoints between two requests: added, removed, another TTL, another scope."""

from collections.abc import Iterator

from vllm_cachescope.diagnosis.changes import ABSENT, PRESENT, Change, ChangeKind
from vllm_cachescope.diagnosis.fingerprint import Fingerprint, MarkFingerprint
from vllm_cachescope.durations import format_duration
from vllm_cachescope.prompt.request import Region
from vllm_cachescope.tenancy.scope import Scope


def breakpoint_changes(old: Fingerprint, new: Fingerprint) -> Iterator[Change]:
    """Yield the breakpoints that differ, and the lifetime that the request as a whole asks for."""
    theirs, ours = _marks_by_place(old), _marks_by_place(new)
    for key in [*theirs, *(key for key in ours if key not in theirs)]:
        before, after = theirs.get(key), ours.get(key)
        if before is None and after is not None:
            yield Change(
                ChangeKind.MARK_ADDED,
                after.path,
                new.start(after.part + 1),
                after=_words(after),
                value=PRESENT,
                old_value=ABSENT,
            )
        elif after is None and before is not None:
            part = min(before.part, len(new) - 1)
            yield Change(
                ChangeKind.MARK_REMOVED,
                before.path,
                new.start(part + 1),
                before=_words(before),
                value=ABSENT,
                old_value=PRESENT,
            )
        elif before is not None and after is not None:
            yield from _mark_changes(new, before, after)
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


def _marks_by_place(fingerprint: Fingerprint) -> dict[str, MarkFingerprint]:
    """Return the breakpoints by what they stand on: ``tools.Bash``, ``system.1``, ``messages``.

    Those on tools and the system prompt should stay there. Of those on messages only the last
    counts: it moves on with each turn.
    """
    marks: dict[str, MarkFingerprint] = {}
    for mark in fingerprint.marks:
        region = fingerprint.region(mark.part)
        if region is Region.MESSAGES:
            marks["messages"] = mark
        elif region is Region.TOOLS:
            # By name: a tool that moved takes its breakpoint along.
            marks[f"tools.{fingerprint.tools[mark.part].name}"] = mark
        else:
            marks[f"system.{mark.part - fingerprint.counts[0]}"] = mark
    return marks


def _mark_changes(
    new: Fingerprint, before: MarkFingerprint, after: MarkFingerprint
) -> Iterator[Change]:
    if before.scope != after.scope:
        earlier = [mark.part + 1 for mark in new.marks if mark.part < after.part]
        yield Change(
            ChangeKind.SCOPE_CHANGED,
            f"{after.path}.scope",
            # All blocks between the breakpoint before and this one get other hashes.
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
