"""The tools inside a namespace, which is one tool of a request (OpenAI's Responses).

A fingerprint has one entry for the namespace. Its fields are those of the tools inside, each by the
inner tool's name and its own.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

_INNER = re.compile(r"tools\[(.*)\]\.([^.\]]*)", re.DOTALL)


def namespace_fields(tools: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Yield the fields of the tools in a namespace, by a name that `named` reads."""
    for i, tool in enumerate(tools):
        if not isinstance(tool, dict):
            yield f"tools[{i}].", tool
            continue
        for key, value in tool.items():
            yield f"tools[{tool.get('name', i)}].{key}", value


def named(tool: str, fields: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return which tools changed and which of their fields: those inside a namespace as
    ``namespace.tool``.

    Args:
        tool: the name of the tool or the namespace.
        fields: names of its fields that changed.
    """
    names: dict[str, None] = {}
    changed: dict[str, None] = {}
    for field in fields:
        inner = _INNER.fullmatch(field)
        names[f"{tool}.{inner[1]}" if inner else tool] = None
        if own := inner[2] if inner else field:
            changed[own] = None
    return tuple(names) or (tool,), tuple(changed)
