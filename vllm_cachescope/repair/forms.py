"""Spellings that come back: tools and inputs of tool calls are spelled as they first were."""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from vllm_cachescope.repair.arrangement import arranged, arrangement_of
from vllm_cachescope.repair.editable_body import EditableBody, ToolInput, tool_name
from vllm_cachescope.repair.repair import Repair, RepairKind
from vllm_cachescope.repair.session_memory import Lessons, SessionState
from vllm_cachescope.repair.spelling import (
    input_in_any_spelling,
    packed,
    parsed_exactly,
    tool_in_any_spelling,
    unpacked,
)
from vllm_cachescope.wire.blocks import MARKERS, without_marks

Recall = Callable[[bytes], bytes | None]
"""Returns a first spelling by its digest; None if it is not remembered."""


class Forms:
    """The spellings of a session.

    Args:
        state: what came first in the session.
        lessons: takes what comes first now.
        recall: returns first spellings.
    """

    def __init__(self, state: SessionState, lessons: Lessons, recall: Recall) -> None:
        self._state, self._lessons, self._recall = state, lessons, recall

    def mend_tools(self, body: EditableBody, any_order: bool, any_defaults: bool) -> list[Repair]:
        """Spell each tool as it first was, and return what that was.

        Args:
            body: the body, which is changed.
            any_order: whether keys and sets may have come in another order.
            any_defaults: whether fields may have come or gone that say what their absence says.
        """
        found: list[Repair] = []
        tools = body.tools
        for i, tool in enumerate(tools):
            if (name := tool_name(tool)) is None:
                continue
            bare = without_marks(tool, depth=0)
            try:
                even = partial(_even_tool, any_order, any_defaults)
                first = self._first(b"tool" + packed(name), packed(bare), even)
                if first is None:
                    continue
                mended = unpacked(first)
                is_json = any_order and (tool_in_any_spelling(mended) == tool_in_any_spelling(bare))
            except (ValueError, RecursionError):
                continue
            tools[i] = _marked_as(mended, tool)
            kind = RepairKind.JSON if is_json else RepairKind.FIELD
            found.append(Repair(kind, f"tools[{i}]"))
        return found

    def mend_inputs(self, body: EditableBody) -> list[Repair]:
        """Spell the input of each tool call as it first was, and return what that was."""
        found: list[Repair] = []
        for call in body.tool_inputs():
            try:
                mended = self._input(call)
            except (ValueError, RecursionError):
                continue
            if mended is not None:
                call.owner[call.key] = mended
                found.append(Repair(RepairKind.JSON, call.path))
        return found

    def _input(self, call: ToolInput) -> Any:
        """Return the first spelling of an input; None if that is how it is spelled.

        Raises:
            ValueError, RecursionError: if it has none that all readers understand alike.
        """
        value = call.owner[call.key]
        about = packed(call.call)
        if isinstance(value, str):
            first = self._first(b"text" + about, value.encode(), _even_text, is_text=True)
            return None if first is None else first.decode()
        if not _has_spellings(value):
            return None
        first = self._first(b"input" + about, packed(value), _even_input)
        return None if first is None else unpacked(first)

    def _first(
        self, about: bytes, data: bytes, even: Callable[[bytes], bytes], is_text: bool = False
    ) -> bytes | None:
        """Return the first spelling of what is spelled as ``data`` now; None if that is the first,
        or is not remembered.

        Args:
            about: what it is of.
            data: its spelling.
            even: returns bytes that it has in any spelling; not called for one that is known to be
                the first.
            is_text: whether spellings are JSON texts.
        """
        digest = _digest(about, data)
        if digest in self._state.firsts:
            return None
        evened = even(data)
        key = _digest(about, evened)
        known = self._state.forms.get(key) or self._lessons.forms.get(key)
        if known is not None:
            return None if known == digest else self._recall(known)
        first = self._told(key, evened, even, is_text) or data
        self._lessons.forms[key] = digest = _digest(about, first)
        self._lessons.texts[digest] = first
        # What cannot be told stays here.
        with suppress(ValueError, RecursionError):
            if key not in self._state.arrangements:
                self._lessons.arrangements[key] = arrangement_of(first, evened, is_text)
        return None if first == data else first

    def _told(
        self, key: bytes, evened: bytes, even: Callable[[bytes], bytes], is_text: bool
    ) -> bytes | None:
        """Return the first spelling as another replica has told how it was arranged; None if none
        has, or what it told makes something else of it here."""
        arrangement = self._state.arrangements.get(key)
        if arrangement is None:
            return None
        try:
            first = arranged(evened, arrangement, is_text)
            return first if even(first) == evened else None
        except (ValueError, RecursionError):
            return None


def _even_tool(any_order: bool, any_defaults: bool, data: bytes) -> bytes:
    tool = unpacked(data)
    return tool_in_any_spelling(tool, any_order=any_order, any_defaults=any_defaults)


def _even_text(data: bytes) -> bytes:
    return input_in_any_spelling(parsed_exactly(data.decode()))


def _even_input(data: bytes) -> bytes:
    return input_in_any_spelling(unpacked(data))


def _digest(about: bytes, data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16, key=hashlib.sha256(about).digest()).digest()


def _has_spellings(value: Any) -> bool:
    """Whether there are two keys anywhere whose order could change."""
    if isinstance(value, dict):
        return len(value) > 1 or any(map(_has_spellings, value.values()))
    return isinstance(value, list) and any(map(_has_spellings, value))


def _marked_as(tool: dict[str, Any], marked: dict[str, Any]) -> dict[str, Any]:
    """Return ``tool`` with the breakpoints that ``marked``, the same tool, has."""
    inner = marked.get("function")
    if isinstance(inner, dict) and isinstance(tool.get("function"), dict):
        kept = {key: inner[key] for key in MARKERS if key in inner}
        tool = {**tool, "function": {**tool["function"], **kept}}
    return {**tool, **{key: marked[key] for key in MARKERS if key in marked}}
