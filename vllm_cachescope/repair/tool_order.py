"""The order of tools: the one in which they first came, those that came later at the end.

No tool passes a breakpoint: what a breakpoint covers, and whom it is shared with, stays the
client's choice. So the tools between two breakpoints change places among themselves.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from vllm_cachescope.repair.editable_body import tool_name
from vllm_cachescope.wire.blocks import MARKERS


def identities(tools: Sequence[Any]) -> list[str] | None:
    """Return by what each tool is told from the others: its name, or the type of a built-in tool
    that has none; None where that does not tell all of them apart."""
    names = [tool_name(tool) or _type(tool) for tool in tools]
    known = [name for name in names if name is not None]
    return known if len(known) == len(names) and len(set(known)) == len(known) else None


def in_order(tools: Sequence[Any], rank: Mapping[str, int]) -> list[Any] | None:
    """Return the tools by rank; None if they are, or cannot be told apart. Breakpoints keep their
    places.

    Args:
        tools: the tools.
        rank: the rank of each of them by its identity. One without a rank comes last.
    """
    names = identities(tools)
    if names is None:
        return None
    ranks = [rank.get(name, len(rank)) for name in names]
    ends = [i + 1 for i, tool in enumerate(tools) if _is_marked(tool)]
    borders = sorted({0, *ends, len(tools)})
    order = [
        i
        for start, end in pairwise(borders)
        for i in sorted(range(start, end), key=ranks.__getitem__)
    ]
    if order == list(range(len(tools))):
        return None
    return [_with_marks_of(tools[i], tools[at]) for at, i in enumerate(order)]


def _is_marked(tool: Any) -> bool:
    inner = tool.get("function")
    return any(key in tool or (isinstance(inner, dict) and key in inner) for key in MARKERS)


def _with_marks_of(tool: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return ``tool`` with the breakpoints of the tool in whose place it comes."""
    if tool is other or not (_is_marked(tool) or _is_marked(other)):
        return tool
    marks = _marks(other)
    bare = {key: value for key, value in tool.items() if key not in MARKERS}
    inner, theirs = tool.get("function"), other.get("function")
    if isinstance(inner, dict):
        bare["function"] = {key: value for key, value in inner.items() if key not in MARKERS}
        if isinstance(theirs, dict):
            bare["function"] |= _marks(theirs)
    elif isinstance(theirs, dict):
        marks = _marks(theirs) | marks
    return bare | marks


def _marks(owner: Mapping[str, Any]) -> dict[str, Any]:
    return {key: owner[key] for key in MARKERS if key in owner}


def _type(tool: Any) -> str | None:
    kind = tool.get("type") if isinstance(tool, dict) else None
    return kind if isinstance(kind, str) and kind != "function" else None
