"""Collects the parts of a request in prompt order, with the breakpoints that end them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from vllm_cachescope.durations import format_duration
from vllm_cachescope.errors import BadRequest
from vllm_cachescope.prompt.request import Mark, Part, Region
from vllm_cachescope.tenancy.scope import Scope
from vllm_cachescope.wire.blocks import BREAKPOINT, CACHE_CONTROL, blocks_within, without_marks
from vllm_cachescope.wire.fields import read_choice, read_object, read_scope, read_ttl

# Anthropic's limit for a request, the automatic breakpoint included; OpenAI writes as many.
MAX_BREAKPOINTS = 4

DEFAULT_TTL_S = 300

_THINKING = ("thinking", "redacted_thinking", "reasoning")
_TEXT = ("text", "input_text", "output_text")


@dataclass(frozen=True, slots=True)
class _Found:
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


class PartCollector:
    """Takes a request's parts one by one and checks the markers on them.

    Add the parts in prompt order (tools, system, messages); then call `settle` once. Every
    method raises BadRequest for a marker that is wrong or stands where none may.

    Args:
        ttls: lifetimes a marker may ask for, in seconds.
        breakpoints: whether the format has OpenAI's ``prompt_cache_breakpoint``. Where it has
            not, that key is the client's own data.
    """

    def __init__(self, ttls: Collection[int], *, breakpoints: bool) -> None:
        self._ttls = ttls
        self._kinds = (CACHE_CONTROL, BREAKPOINT) if breakpoints else (CACHE_CONTROL,)
        self._parts: list[Part] = []
        self._found: list[_Found] = []

    def tools(self, tools: object) -> None:
        """Add the list ``tools`` of the body; anything but a list is left to the server."""
        for i, tool in enumerate(tools if isinstance(tools, list) else ()):
            path = f"tools[{i}]"
            if isinstance(tool, Mapping):
                self.refuse(tool.get("function"), f"{path}.function")
                self.refuse(tool, path, kinds=(BREAKPOINT,))
                self._read(tool, path)
            self._parts.append(Part(Region.TOOLS, path, without_marks(tool, depth=0)))

    def add(self, region: Region, path: str, value: object, role: str | None = None) -> None:
        """Add a part that no marker can stand on: a string, or what the server will refuse."""
        self._parts.append(Part(region, path, value, role))

    def block(self, region: Region, path: str, value: object, role: str | None = None) -> None:
        """Add a content block. Markers on blocks nested in it end this part as well."""
        for inner_path, inner in blocks_within(value, path):
            self._read(inner, inner_path)
        self._parts.append(Part(region, path, without_marks(value), role))

    def end(self, owner: Mapping[str, Any], path: str) -> None:
        """Let ``owner.cache_control`` end the last part added."""
        self.refuse(owner, path, kinds=(BREAKPOINT,))
        if owner.get(CACHE_CONTROL) is None:
            return
        if not _can_end(self._parts[-1].content):
            raise BadRequest(
                f"{path}.{CACHE_CONTROL}", owner[CACHE_CONTROL], "only on a message with content"
            )
        self._take(CACHE_CONTROL, owner[CACHE_CONTROL], path, part=len(self._parts) - 1)

    def refuse(
        self,
        owner: object,
        path: str,
        allowed: str = "only on tools and content blocks, or once at the top level",
        kinds: tuple[str, ...] | None = None,
    ) -> None:
        """Raise BadRequest if ``owner``, where no marker may stand, carries one."""
        if isinstance(owner, Mapping):
            for kind in kinds or self._kinds:
                if kind in self._kinds and owner.get(kind) is not None:
                    raise BadRequest(f"{path}.{kind}", owner[kind], allowed)

    def settle(
        self, top_level: object, default_ttl_s: int, keep_breakpoints: int = MAX_BREAKPOINTS
    ) -> tuple[tuple[Part, ...], bool]:
        """Return the parts with their breakpoints, and whether there is any ``cache_control``.

        Args:
            top_level: the body's own ``cache_control``. It falls on the last part that can carry
                a breakpoint; if that part has one already, the two must agree on the lifetime.
            default_ttl_s: the lifetime in seconds of a marker that names none.
            keep_breakpoints: how many of OpenAI's breakpoints count. Where there are more, the
                latest do (``prompt_cache_options.mode`` in the `openai` package): a conversation
                carries its old ones along.
        """
        controls = [found for found in self._found if found.kind == CACHE_CONTROL]
        breakpoints = [found for found in self._found if found.kind == BREAKPOINT]
        if breakpoints and (controls or top_level is not None):
            raise BadRequest(
                breakpoints[0].mark.path,
                breakpoints[0].value,
                f"either {CACHE_CONTROL} or {BREAKPOINT} in a request, not both",
            )
        if len(controls) > MAX_BREAKPOINTS:
            fifth = controls[MAX_BREAKPOINTS]
            raise BadRequest(fifth.mark.path, fifth.value, _AT_MOST)
        if top_level is not None:
            controls += self._automatic(top_level, controls, default_ttl_s)
        _check_order([found.mark for found in controls], default_ttl_s)

        by_part: dict[int, list[Mark]] = {}
        for found in controls + breakpoints[-keep_breakpoints:]:
            by_part.setdefault(found.part, []).append(found.mark)
        for i, marks in by_part.items():
            self._parts[i] = replace(self._parts[i], mark=_merged(marks, default_ttl_s))
        return tuple(self._parts), bool(controls) or top_level is not None

    def _read(self, block: Mapping[str, Any], path: str) -> None:
        for kind in self._kinds:
            if block.get(kind) is None:
                continue
            if block.get("type") in _THINKING:
                raise BadRequest(f"{path}.{kind}", block[kind], "none on a thinking block")
            if not _can_end(block):
                raise BadRequest(f"{path}.{kind}", block[kind], "only on a text block with text")
            self._take(kind, block[kind], path, part=len(self._parts))

    def _take(self, kind: str, value: object, path: str, part: int) -> None:
        path = f"{path}.{kind}"
        if kind == BREAKPOINT:
            fields = read_object(value, path, ("mode", "ttl"))
            read_choice(fields.get("mode"), f"{path}.mode", ("explicit",))
            mark = Mark(path, read_ttl(fields.get("ttl"), f"{path}.ttl", self._ttls))
        else:
            mark = read_cache_control(value, path, self._ttls)
        self._found.append(_Found(part, kind, mark, value))

    def _automatic(self, value: object, controls: list[_Found], default_ttl_s: int) -> list[_Found]:
        mark = read_cache_control(value, CACHE_CONTROL, self._ttls)
        if len(controls) == MAX_BREAKPOINTS:
            raise BadRequest(CACHE_CONTROL, value, _AT_MOST)
        ends = (i for i in reversed(range(len(self._parts))) if _can_end(self._parts[i].content))
        last = next(ends, None)
        if last is None:
            return []
        for found in controls:
            there = _ttl(found.mark, default_ttl_s)
            if found.part == last and there != _ttl(mark, default_ttl_s):
                raise BadRequest(
                    f"{CACHE_CONTROL}.ttl",
                    format_duration(_ttl(mark, default_ttl_s)),
                    f"{format_duration(there)}, as {found.mark.path} on the same block has it",
                )
        return [_Found(last, CACHE_CONTROL, mark, value)]


_AT_MOST = f"at most {MAX_BREAKPOINTS} breakpoints in a request"


def read_cache_control(value: object, path: str, ttls: Collection[int]) -> Mark:
    """Return the breakpoint that the ``cache_control`` object ``value`` at ``path`` sets.

    Raises:
        BadRequest: for another type than ``ephemeral``, a ttl not in ``ttls``, an unknown scope
            or an unknown key.
    """
    fields = read_object(value, path, ("type", "ttl", "scope"))
    read_choice(fields.get("type"), f"{path}.type", ("ephemeral",))
    return Mark(
        path,
        read_ttl(fields.get("ttl"), f"{path}.ttl", ttls),
        read_scope(fields.get("scope"), f"{path}.scope"),
    )


def _can_end(content: Any) -> bool:
    """Tell whether a breakpoint may end a part with this content."""
    if isinstance(content, Mapping):
        kind = content.get("type")
        if kind in _TEXT:
            return isinstance(content.get("text"), str) and content["text"] != ""
        return kind not in _THINKING
    return content is not None and content != "" and content != []


def _ttl(mark: Mark, default_ttl_s: int) -> int:
    return default_ttl_s if mark.ttl_s is None else mark.ttl_s


def _check_order(marks: list[Mark], default_ttl_s: int) -> None:
    for before, mark in pairwise(marks):
        longest = _ttl(before, default_ttl_s)
        if _ttl(mark, default_ttl_s) > longest:
            raise BadRequest(
                f"{mark.path}.ttl",
                format_duration(_ttl(mark, default_ttl_s)),
                f"at most {format_duration(longest)}, the lifetime of the earlier {before.path}",
            )
    for before, mark in pairwise(mark for mark in marks if mark.scope is not None):
        assert before.scope is not None and mark.scope is not None
        if mark.scope < before.scope:
            narrower = ", ".join(scope.label for scope in Scope if scope >= before.scope)
            raise BadRequest(
                f"{mark.path}.scope",
                mark.scope.label,
                f"{narrower}, as the earlier {before.path} has narrowed it",
            )


def _merged(marks: list[Mark], default_ttl_s: int) -> Mark:
    """Return one breakpoint in place of several that end the same part: with the longest of their
    lifetimes and the narrowest of their scopes."""
    longest = max(marks, key=lambda mark: _ttl(mark, default_ttl_s))
    scopes = [mark.scope for mark in marks if mark.scope is not None]
    return Mark(marks[-1].path, longest.ttl_s, max(scopes, default=None))
