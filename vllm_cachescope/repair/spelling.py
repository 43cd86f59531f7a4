"""The spellings of tools and of tool calls' inputs: what is told apart by them, and what is not.

JSON gives the order of keys no meaning, nor JSON Schema that of ``required``, ``enum`` and
``type``. Some fields of a schema say what their absence says.
"""

import json
from collections.abc import Mapping
from typing import Any

import msgspec

_SETS = ("required", "enum", "type")
_DATA = ("default", "const", "examples", "enum", "required", "type")  # no schemas in there
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_SCHEMAS = ("parameters", "input_schema", "inputSchema")  # of a tool

_COMMENTS = ("$schema", "$comment")
"""For programs that check schemas: no template, grammar or parser of vLLM's looks at them."""

DEFAULTS: Mapping[str, Any] = {
    "additionalProperties": True,
    "deprecated": False,
    "description": "",
    "minItems": 0,
    "minLength": 0,
    "minProperties": 0,
    "nullable": False,
    "readOnly": False,
    "required": [],
    "title": "",
    "uniqueItems": False,
    "writeOnly": False,
}
"""Fields of a schema, with the value that says what their absence says."""


def packed(value: Any) -> bytes:
    """Return the bytes of a spelling, which `unpacked` turns back.

    Raises:
        ValueError: for what cannot be packed: half a surrogate pair, an integer of over 64 bits.
        RecursionError: for what is nested too deeply.
    """
    try:
        return msgspec.msgpack.encode(value)
    except OverflowError as error:
        raise ValueError(str(error)) from None


def unpacked(data: bytes) -> Any:
    """Return the value whose spelling `packed` has packed."""
    return msgspec.msgpack.decode(data)


def tool_in_any_spelling(
    tool: Mapping[str, Any], *, any_order: bool = True, any_defaults: bool = False
) -> bytes:
    """Return bytes that a tool has in any spelling.

    Args:
        tool: the tool, without breakpoints.
        any_order: whether the order of keys and sets is not told apart.
        any_defaults: whether fields that say what their absence says are not told apart from it.

    Raises:
        ValueError, RecursionError: as `packed`.
    """
    return packed(_Evened(any_order, any_defaults).tool(tool))


def input_in_any_spelling(value: Any) -> bytes:
    """Return bytes that the input of a tool call has in any spelling.

    Raises:
        ValueError, RecursionError: as `packed`.
    """
    return packed(_Evened(True, False).data(value))


def parsed_exactly(text: str) -> Any:
    """Return the value of a JSON text that has no second reading.

    Raises:
        ValueError: if it is no JSON, a key comes twice, or a number is not as Python writes it:
            readers may differ in what they make of those.
        RecursionError: if it is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_once, parse_float=_exact, parse_constant=_exact)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key comes twice")
    return found


def _exact(text: str) -> float:
    if repr(value := float(text)) != text:
        raise ValueError(f"not the only way to write it: {text}")
    return value


class _Evened:
    """Values with what tells spellings apart evened out."""

    def __init__(self, any_order: bool, any_defaults: bool) -> None:
        self._any_order = any_order
        self._any_defaults = any_defaults

    def tool(self, tool: Mapping[str, Any]) -> dict[str, Any]:
        """Even out a tool, or the object inside of it that has its schema."""
        found: dict[str, Any] = {}
        for key, value in self._items(tool):
            if self._any_defaults and (value is None or (key == "description" and value == "")):
                continue
            if key in ("function", "toolSpec") and isinstance(value, dict):
                found[key] = self.tool(value)
            elif key == "inputSchema" and isinstance(value, dict) and list(value) == ["json"]:
                found[key] = {"json": self.schema(value["json"])}
            else:
                found[key] = self.schema(value) if key in _SCHEMAS else self.data(value)
        return found

    def schema(self, schema: Any) -> Any:
        if isinstance(schema, list):
            return [self.schema(one) for one in schema]
        if not isinstance(schema, dict):
            return schema
        found: dict[str, Any] = {}
        for key, value in self._items(schema):
            if self._any_defaults and _says_nothing(key, value):
                continue
            if self._any_order and key in _SETS and _is_set(value):
                found[key] = sorted(value, key=lambda one: (type(one).__name__, str(one)))
            elif key in _DATA:
                found[key] = self.data(value)
            elif key in _BY_NAME and isinstance(value, dict):
                found[key] = {name: self.schema(one) for name, one in self._items(value)}
            else:
                found[key] = self.schema(value)
        return found

    def data(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self.data(one) for key, one in self._items(value)}
        return [self.data(one) for one in value] if isinstance(value, list) else value

    def _items(self, value: Mapping[str, Any]) -> list[tuple[str, Any]]:
        return sorted(value.items()) if self._any_order else list(value.items())


def _is_set(value: Any) -> bool:
    return isinstance(value, list) and not any(isinstance(one, dict | list) for one in value)


def _says_nothing(key: str, value: Any) -> bool:
    if key in _COMMENTS:
        return True
    default = DEFAULTS.get(key)
    # 0 == False, and either means something of its own.
    return default is not None and type(value) is type(default) and value == default
