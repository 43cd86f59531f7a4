"""Which of the markers found in a request make breakpoints, with which lifetime and scope."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from vllm_cachescope.durations import format_duration
from vllm_cachescope.errors import BadRequest
from vllm_cachescope.prompt.ignored_marker import IgnoredReason
from vllm_cachescope.prompt.request import Mark
from vllm_cachescope.tenancy.scope import Scope
from vllm_cachescope.wire.blocks import BREAKPOINT, CACHE_CONTROL
from vllm_cachescope.wire.fields import read_choice, read_scope, read_ttl
from vllm_cachescope.wire.mistakes import Mistakes

# Anthropic's limit for a request, the automatic breakpoint included; OpenAI writes as many.
MAX_BREAKPOINTS = 4

_AT_MOST = f"at most {MAX_BREAKPOINTS} breakpoints in a request"
_KEYS = {CACHE_CONTROL: ("type", "ttl", "scope"), BREAKPOINT: ("mode", "ttl")}
_TYPES = {CACHE_CONTROL: ("type", "ephemeral"), BREAKPOINT: ("mode", "explicit")}


@dataclass(frozen=True, slots=True)
class FoundMarker:
    """A marker that was found.

    Attributes:
        part: index of the part that it ends.
        kind: the key that it stands under, one of `MARKERS`.
        mark: the marker as it was read.
        value: the marker as the client wrote it.
    """

    part: int
    kind: str
    mark: Mark
    value: object


class Breakpoints:
    """Takes a request's markers in prompt order, then tells the breakpoints that they make.

    Where mistakes refuse the request, every method raises `BadRequest` for one.

    Args:
        ttls: lifetimes that a marker may ask for, in seconds.
        mistakes: takes what is wrong with the markers.

    Attributes:
        narrowed: the narrowest scope that ignored markers name, by the index of the part that they
            stand on. Sharing must never be wider than a client asks for, however badly.
    """

    def __init__(self, ttls: Collection[int], mistakes: Mistakes) -> None:
        self._ttls = ttls
        self._mistakes = mistakes
        self._found: list[FoundMarker] = []
        self.narrowed: dict[int, Scope] = {}

    def take(self, kind: str, value: object, path: str, part: int) -> None:
        """Take the marker ``value`` under the key ``kind`` of the object at ``path``, which ends
        the part with the index ``part``."""
        if (found := self._read(kind, value, f"{path}.{kind}", part)) is not None:
            self._found.append(found)

    def add(self, mark: Mark, part: int, value: object) -> None:
        """Take a marker that has been read: ``mark``, written as ``value``, which ends the part
        with the index ``part``."""
        self._found.append(FoundMarker(part, CACHE_CONTROL, mark, value))

    def ignore(
        self,
        reason: IgnoredReason,
        path: str,
        value: object,
        part: int,
        allowed: str = "",
    ) -> None:
        """Take a marker that makes no breakpoint.

        Args:
            reason: why not.
            path: where the marker stands.
            value: the marker.
            part: index of the part that it would end.
            allowed: what may stand there.
        """
        self._mistakes.found(reason, path, value, allowed)
        self._narrow(part, value)

    def settle(
        self, top_level: object, last: int | None, default_ttl_s: int, keep_breakpoints: int
    ) -> tuple[dict[int, Mark], bool, bool]:
        """Return the breakpoints.

        Args:
            top_level: the body's own ``cache_control``.
            last: index of the part that ``top_level`` ends: the last one that can carry a
                breakpoint; None if there is none. If that part has one already, the two must agree
                on the lifetime.
            default_ttl_s: the lifetime in seconds of a marker that names none.
            keep_breakpoints: how many of OpenAI's breakpoints count. Where there are more, the
                latest do (``prompt_cache_options.mode`` in the `openai` package): a conversation
                carries its old ones along.

        Returns:
            The breakpoints by the index of the part that they end; whether any comes from
            ``cache_control``; whether any other comes from OpenAI's key.
        """
        points = [found for found in self._found if found.kind == BREAKPOINT]
        controlled = len(self._found) > len(points) or top_level is not None
        if points and controlled:
            self._mistakes.found(
                IgnoredReason.TWO_DIALECTS,
                points[0].mark.path,
                points[0].value,
                f"either {CACHE_CONTROL} or {BREAKPOINT} in a request, not both",
            )
        if top_level is not None:
            well_formed = self._take_top_level(top_level, last, default_ttl_s)
            controlled = well_formed or len(self._found) > len(points)
        kept = self._latest(MAX_BREAKPOINTS if controlled else keep_breakpoints, controlled)
        if controlled:
            kept = self._narrowing(self._shortening(kept, default_ttl_s))

        by_part: dict[int, list[Mark]] = {}
        for found in kept:
            by_part.setdefault(found.part, []).append(found.mark)
        mixed = bool(points) and controlled
        pick = min if mixed else max
        merged = {
            part: Mark(
                marks[-1].path,
                pick(marks, key=lambda mark: _ttl(mark, default_ttl_s)).ttl_s,
                max((mark.scope for mark in marks if mark.scope is not None), default=None),
            )
            for part, marks in by_part.items()
        }
        return merged, controlled, mixed

    def _read(self, kind: str, value: object, path: str, part: int) -> FoundMarker | None:
        mistakes = self._mistakes
        fields = mistakes.read_object(value, path, _KEYS[kind], IgnoredReason.MALFORMED)
        if fields is None:
            return None
        key, only = _TYPES[kind]
        malformed = IgnoredReason.MALFORMED
        if not mistakes.read(malformed, read_choice, fields.get(key), f"{path}.{key}", (only,)):
            self._narrow(part, value)
            return None
        ttl_s = mistakes.read(
            IgnoredReason.UNKNOWN_TTL, read_ttl, fields.get("ttl"), f"{path}.ttl", self._ttls
        )
        if kind == BREAKPOINT:
            self._narrow(part, value)  # It has no scope; a client may think so.
            return FoundMarker(part, kind, Mark(path, ttl_s), value)
        scope = mistakes.read(
            IgnoredReason.UNKNOWN_SCOPE, read_scope, fields.get("scope"), f"{path}.scope"
        )
        if scope is None:
            scope = _named_scope(value)
        return FoundMarker(part, kind, Mark(path, ttl_s, scope), value)

    def _narrow(self, part: int, value: object) -> None:
        if (scope := _named_scope(value)) is not None:
            self.narrowed[part] = max(scope, self.narrowed.get(part, scope))

    def _take_top_level(self, value: object, last: int | None, default_ttl_s: int) -> bool:
        """Take the automatic marker; return whether it is one."""
        found = self._read(CACHE_CONTROL, value, CACHE_CONTROL, -1 if last is None else last)
        if found is None or last is None:
            return found is not None
        ttl_s = shortest = _ttl(found.mark, default_ttl_s)
        beside = [
            i
            for i, other in enumerate(self._found)
            if other.part == last and other.kind == CACHE_CONTROL
        ]
        for i in beside:
            there = _ttl(self._found[i].mark, default_ttl_s)
            if there != ttl_s:
                self._mistakes.found(
                    IgnoredReason.LONGER_TTL,
                    f"{CACHE_CONTROL}.ttl",
                    format_duration(ttl_s),
                    f"{format_duration(there)}, as {self._found[i].mark.path} on the same block "
                    "has it",
                )
                shortest = min(shortest, there)
        if shortest != ttl_s or any(
            _ttl(self._found[i].mark, default_ttl_s) != shortest for i in beside
        ):
            found = _with_ttl(found, shortest)
            for i in beside:
                self._found[i] = _with_ttl(self._found[i], shortest)
        self._found.append(found)
        return True

    def _latest(self, limit: int, controlled: bool) -> list[FoundMarker]:
        """Return the markers that count: the latest ``limit``."""
        if controlled and self._mistakes.strict and len(self._found) > limit:
            first = self._found[limit]
            raise BadRequest(first.mark.path, first.value, _AT_MOST)
        for found in self._found[:-limit]:
            self._mistakes.ignore(IgnoredReason.TOO_MANY, found.mark.path)
            self._narrow(found.part, found.value)
        return self._found[-limit:]

    def _shortening(self, markers: list[FoundMarker], default_ttl_s: int) -> list[FoundMarker]:
        """Return ``markers``, of which none outlives one before it."""
        kept: list[FoundMarker] = []
        for found in markers:
            ttl_s = _ttl(found.mark, default_ttl_s)
            if kept and ttl_s > (longest := _ttl(kept[-1].mark, default_ttl_s)):
                before = kept[-1].mark.path
                self._mistakes.found(
                    IgnoredReason.LONGER_TTL,
                    f"{found.mark.path}.ttl",
                    format_duration(ttl_s),
                    f"at most {format_duration(longest)}, the lifetime of the earlier {before}",
                )
                found = _with_ttl(found, longest)
            kept.append(found)
        return kept

    def _narrowing(self, markers: list[FoundMarker]) -> list[FoundMarker]:
        """Return ``markers``, of which none is shared more widely than one before it."""
        kept: list[FoundMarker] = []
        widest, narrowed_by = Scope.GLOBAL, ""
        for found in markers:
            mark = found.mark
            if mark.scope is not None and mark.scope < widest:
                narrower = ", ".join(scope.label for scope in Scope if scope >= widest)
                self._mistakes.found(
                    IgnoredReason.WIDER_SCOPE,
                    f"{mark.path}.scope",
                    mark.scope.label,
                    f"{narrower}, as the earlier {narrowed_by} has narrowed it",
                )
                mark = replace(mark, scope=widest)
            elif mark.scope is not None:
                widest, narrowed_by = mark.scope, mark.path
            kept.append(replace(found, mark=mark))
        return kept


def _ttl(mark: Mark, default_ttl_s: int) -> int:
    return default_ttl_s if mark.ttl_s is None else mark.ttl_s


def _with_ttl(found: FoundMarker, ttl_s: int) -> FoundMarker:
    return replace(found, mark=replace(found.mark, ttl_s=ttl_s))


def _named_scope(value: object) -> Scope | None:
    """Return the scope that the marker ``value`` names; the narrowest if there is none of its
    name; None if it names none."""
    name = value.get("scope") if isinstance(value, Mapping) else None
    if name is None:
        return None
    return next((scope for scope in Scope if scope.label == name), Scope.SESSION)
