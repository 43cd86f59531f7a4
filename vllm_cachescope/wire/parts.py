"""Collects the parts of a request in prompt order, with the breakpoints that end them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vllm_cachescope.errors import BadRequest
from vllm_cachescope.prompt.ignored_marker import IgnoredMarker, IgnoredReason
from vllm_cachescope.prompt.request import Part, Region
from vllm_cachescope.wire.blocks import BREAKPOINT, CACHE_CONTROL, blocks_within, without_marks
from vllm_cachescope.wire.breakpoints import MAX_BREAKPOINTS, Breakpoints
from vllm_cachescope.wire.mistakes import Mistakes

DEFAULT_TTL_S = 300

_THINKING = ("thinking", "redacted_thinking", "reasoning")
_TEXT = ("text", "input_text", "output_text")
_PLACES = "only on tools and content blocks, or once at the top level"


@dataclass(frozen=True, slots=True)
class MarkedParts:
    """A request's parts with their breakpoints.

    Attributes:
        parts: the parts.
        controlled: whether any ``cache_control`` counts.
        mixed: whether ``prompt_cache_breakpoint`` stands beside it.
        ignored: what was ignored in the markers.
    """

    parts: tuple[Part, ...]
    controlled: bool
    mixed: bool
    ignored: tuple[IgnoredMarker, ...]


class PartCollector:
    """Takes a request's parts one by one, and the markers on them.

    Add the parts in prompt order (tools, system, messages); then call `settle` once. If ``strict``,
    every method raises BadRequest for a marker that is wrong or stands where its protocol has none.
    If not, markers are also read where clients of other dialects put them, and what is wrong is
    ignored.

    Args:
        ttls: lifetimes a marker may ask for, in seconds.
        breakpoints: whether the format has OpenAI's ``prompt_cache_breakpoint``. Where it has
            not, that key is the client's own data.
        strict: whether a mistake refuses the request.

    Attributes:
        mistakes: takes what is wrong with the request's cache fields.
    """

    def __init__(self, ttls: Collection[int], *, breakpoints: bool, strict: bool) -> None:
        self.mistakes = Mistakes(strict)
        self._kinds = (CACHE_CONTROL, BREAKPOINT) if breakpoints else (CACHE_CONTROL,)
        self._parts: list[Part] = []
        self._breakpoints = Breakpoints(ttls, self.mistakes)

    def __len__(self) -> int:
        """How many parts there are."""
        return len(self._parts)

    def tools(self, tools: object) -> None:
        """Add the list ``tools`` of the body; anything but a list is left to the server."""
        for i, tool in enumerate(tools if isinstance(tools, list) else ()):
            path = f"tools[{i}]"
            if isinstance(tool, Mapping):
                self.refuse_dialect(tool.get("function"), f"{path}.function")
                self.refuse_dialect(tool, path, kinds=(BREAKPOINT,))
                self._read_with_function(tool, path)
            self._parts.append(Part(Region.TOOLS, path, without_marks(tool, depth=0)))

    def add(self, region: Region, path: str, value: object, role: str | None = None) -> None:
        """Add a part that no marker can stand on: a string, or what the server will refuse."""
        self._parts.append(Part(region, path, value, role))

    def block(self, region: Region, path: str, value: object, role: str | None = None) -> None:
        """Add a content block. Markers on blocks nested in it end this part as well."""
        for inner_path, inner in blocks_within(value, path):
            self._read(inner, inner_path, nested=inner is not value, role=role)
        self._parts.append(Part(region, path, without_marks(value), role))

    def calls(self, region: Region, path: str, calls: object, role: str | None) -> None:
        """Add a message's tool calls, each as a list of one: the first as ``path``, those after
        it as ``path[1]`` and so on. Anything but a list is one part."""
        if not isinstance(calls, list):
            self.add(region, path, calls, role)
            return
        for i, call in enumerate(calls):
            call_path = f"{path}[{i}]"
            if isinstance(call, Mapping):
                self.refuse_dialect(call.get("function"), f"{call_path}.function")
                self.refuse_dialect(call, call_path)
                self._read_with_function(call, call_path)
            bare = [without_marks(call, depth=0)]
            self.add(region, call_path if i else path, bare, role)

    def end(self, owner: Mapping[str, Any], path: str, first: int) -> None:
        """Let the marker of the message ``owner`` end the last part added.

        Args:
            owner: the message.
            path: its path.
            first: index of the first part that holds content of the message.
        """
        self.refuse_dialect(owner, path, kinds=(BREAKPOINT,))
        last = len(self._parts) - 1
        # The result of a tool may be empty; the message is there all the same.
        is_result = owner.get("role") == "tool" and not self.mistakes.strict
        content = self._parts[min(first, last) :]
        empty = not is_result and not any(_can_end(part.content) for part in content)
        for kind in self._kinds:
            if (value := owner.get(kind)) is None:
                continue
            if empty:
                self._breakpoints.ignore(
                    IgnoredReason.EMPTY,
                    f"{path}.{kind}",
                    value,
                    last,
                    "only on a message with content",
                )
            else:
                self._breakpoints.take(kind, value, path, last)

    def refuse(self, owner: object, path: str) -> None:
        """Take it as a mistake if ``owner``, where no marker may stand, carries one."""
        if isinstance(owner, Mapping):
            for kind in self._kinds:
                if (value := owner.get(kind)) is not None:
                    reason = IgnoredReason.MISPLACED
                    self._breakpoints.ignore(reason, f"{path}.{kind}", value, -1, _PLACES)

    def refuse_dialect(
        self,
        owner: object,
        path: str,
        allowed: str = _PLACES,
        kinds: tuple[str, ...] | None = None,
    ) -> None:
        """If strict, refuse a marker on ``owner``, where only clients of other dialects put one."""
        if self.mistakes.strict and isinstance(owner, Mapping):
            for kind in kinds or self._kinds:
                if kind in self._kinds and owner.get(kind) is not None:
                    raise BadRequest(f"{path}.{kind}", owner[kind], allowed)

    def settle(
        self, top_level: object, default_ttl_s: int, keep_breakpoints: int = MAX_BREAKPOINTS
    ) -> MarkedParts:
        """Return the parts with their breakpoints.

        Args:
            top_level: the body's own ``cache_control``. It falls on the last part that can carry
                a breakpoint.
            default_ttl_s: the lifetime in seconds of a marker that names none.
            keep_breakpoints: how many of OpenAI's breakpoints count; see `Breakpoints.settle`.
        """
        ends = (i for i in reversed(range(len(self._parts))) if _can_end(self._parts[i].content))
        last = None if top_level is None else next(ends, None)
        marks, controlled, mixed = self._breakpoints.settle(
            top_level, last, default_ttl_s, keep_breakpoints
        )
        parts = self._parts
        for i, mark in marks.items():
            parts[i] = replace(parts[i], mark=mark)
        for i, scope in self._breakpoints.narrowed.items() if parts else ():
            narrowed = parts[i].narrowed
            parts[i] = replace(
                parts[i], narrowed=scope if narrowed is None else max(scope, narrowed)
            )
        return MarkedParts(tuple(parts), controlled, mixed, tuple(self.mistakes.ignored))

    def _read_with_function(self, owner: Mapping[str, Any], path: str) -> None:
        """Read the markers of a tool or a tool call, whichever of its two objects has them."""
        for inner_path, inner in blocks_within(owner, path, depth=0):
            self._read(inner, inner_path, nested=True)

    def _read(
        self, block: Mapping[str, Any], path: str, *, nested: bool, role: str | None = None
    ) -> None:
        strict = self.mistakes.strict
        for kind in self._kinds:
            if (value := block.get(kind)) is None:
                continue
            part = len(self._parts)
            if block.get("type") in _THINKING:
                reason, allowed = IgnoredReason.MISPLACED, "none on a thinking block"
            # What holds a nested block ends there, as does the result of a tool, though empty.
            elif not _can_end(block) and (strict or not (nested or role == "tool")):
                reason, allowed = IgnoredReason.EMPTY, "only on a text block with text"
            elif strict and not nested and _is_blank(block):
                reason, allowed = IgnoredReason.EMPTY, "only on a text block with more than spaces"
            else:
                self._breakpoints.take(kind, value, path, part)
                continue
            self._breakpoints.ignore(reason, f"{path}.{kind}", value, part, allowed)


def _can_end(content: Any) -> bool:
    """Tell whether a breakpoint may end a part with this content."""
    if isinstance(content, Mapping):
        kind = content.get("type")
        if kind in _TEXT:
            return isinstance(content.get("text"), str) and content["text"] != ""
        return kind not in _THINKING
    return content is not None and content != "" and content != []


def _is_blank(block: Mapping[str, Any]) -> bool:
    """Tell whether a block is text that is nothing but spaces, which Anthropic's API refuses."""
    text = block.get("text")
    return block.get("type") in _TEXT and isinstance(text, str) and not text.strip()
