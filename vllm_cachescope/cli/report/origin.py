"""The origin of a prompt's part: which tool, which file, or whose words it is."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_cachescope.prompt.request import Part, Region

_FILE_FIELDS = ("file_path", "path", "filename", "file", "notebook_path", "filepath", "uri", "url")
_MAX_NAME = 120
_TURN = re.compile(r"(?:messages|input)\[(\d+)")


@dataclass(frozen=True, slots=True)
class Origin:
    """What a part of a prompt is.

    Attributes:
        kind: ``tool`` for the definition of one, ``result`` for what one returned, ``call`` for
            its input, ``system``, or the role whose words it is.
        tool: the tool's name; None where it is none's.
        file: the file that it was asked for; None where no file is named.
    """

    kind: str
    tool: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        """Say it in words, as in ``result of Read, src/main.py``."""
        if self.tool is None:
            return self.kind
        of = f"{self.kind} of {self.tool}" if self.kind != "tool" else f"definition of {self.tool}"
        return f"{of}, {self.file}" if self.file else of


def origins(parts: Sequence[Part], paths: Collection[str]) -> dict[str, Origin]:
    """Return the origins of a request's parts, by their paths.

    Args:
        parts: all parts of the request.
        paths: the parts to name.
    """
    calls: dict[str, tuple[str, str | None]] = {}
    answered: dict[str, str] = {}  # by message, the call whose result it is, in Chat
    found: dict[str, Origin] = {}
    for part in parts:
        content = _fields(part.content)
        kind = content.get("type")
        if part.region is Region.TOOLS:
            origin = Origin("tool", _tool_name(content))
        elif part.region is Region.SYSTEM:
            origin = Origin("system")
        elif (call := _call(content)) is not None:
            calls[call[0]] = call[1:]
            origin = Origin("call", *call[1:])
        elif kind in ("tool_result", "function_call_output", "custom_tool_call_output"):
            asked = content.get("tool_use_id") or content.get("call_id")
            origin = Origin("result", *calls.get(str(asked), ("?", None)))
        else:
            message = _message(part.path)
            if isinstance(asked := content.get("tool_call_id"), str):
                answered[message] = asked
            if part.role == "tool":
                asked = answered.get(message, "")
                origin = Origin("result", *calls.get(asked, ("?", None)))
            else:
                origin = Origin(part.role or "user")
        if part.path in paths:
            found[part.path] = origin
    return found


def _fields(content: object) -> Mapping[str, Any]:
    """Return the fields of a part; in Chat, the first call of a message is a list of one."""
    if isinstance(content, list) and len(content) == 1:
        content = content[0]
    return content if isinstance(content, Mapping) else {}


def _call(content: Mapping[str, Any]) -> tuple[str, str, str | None] | None:
    """Return id, tool and file of a call of a tool; None for what is no call."""
    kind = content.get("type")
    if kind == "tool_use":
        return str(content.get("id")), _named(content.get("name")), _file(content.get("input"))
    if kind == "function_call":
        name, asked = content.get("name"), content.get("arguments")
        return str(content.get("call_id")), _named(name), _file(asked)
    function = content.get("function")
    if "id" in content and isinstance(function, Mapping):
        name, asked = function.get("name"), function.get("arguments")
        return str(content["id"]), _named(name), _file(asked)
    return None


def _file(given: object) -> str | None:
    """Return the file that a tool's input names."""
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            return None
    if not isinstance(given, Mapping):
        return None
    named = (given.get(field) for field in _FILE_FIELDS)
    return next((name[:_MAX_NAME] for name in named if isinstance(name, str) and name), None)


def _tool_name(tool: Mapping[str, Any]) -> str:
    function = tool.get("function")
    named = function if isinstance(function, Mapping) else tool
    return _named(named.get("name") or tool.get("type"))


def _named(name: object) -> str:
    return name[:_MAX_NAME] if isinstance(name, str) and name else "?"


def _message(path: str) -> str:
    match = _TURN.match(path)
    return match[1] if match else path
