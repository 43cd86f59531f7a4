"""Canonical bytes of JSON values: equal where two values render to the same prompt.

Fingerprints hash these bytes, so every request of a session has to get the same ones.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import msgspec
from pydantic_core import PydanticSerializationError, to_json

from vllm_cachescope.diagnosis.long_text import evened, is_even, is_long, utf8

_ORDERED = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
_SORTED = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), sort_keys=True)

_IDS = ("id", "call_id", "tool_use_id", "tool_call_id")

_MAX_LOOSENED = 2**24
"""Characters of a text that has another spelling: more than fit into any model's context."""

_TEXT_TYPES = ("text", "input_text", "output_text")


class CanonicalContent(NamedTuple):
    """The content of a part as bytes.

    Attributes:
        form: how ``data`` encodes the content: ``b"t"`` as a text, ``b"s"`` as an object of
            strings, ``b"j"`` as JSON. Hashed along, so that a text is never taken for JSON.
        data: the bytes.
        text: the content as a string, if it is nothing but a text.
    """

    form: bytes
    data: bytes
    text: str | None


def canonical_content(content: Any) -> CanonicalContent:
    """Return the canonical bytes of ``content``, as `respelled` returns it."""
    text = text_of(content)
    if text is not None:
        return CanonicalContent(b"t", utf8(text), text)
    if (strings := _strings(content)) is not None:
        return CanonicalContent(b"s", strings, None)
    return CanonicalContent(b"j", json_bytes(content), None)


def respelled(content: Any) -> Any:
    """Return ``content`` in one of the spellings that vLLM reads alike.

    - The order of the fields of a tool call or a tool result means nothing.
    - The content of a tool result means the same as a string and as a single text block.
    - vLLM parses a call's arguments where they are JSON in a string (`AnthropicServingMessages`
      and the chat renderer of vLLM 0.32).

    Clients change from one spelling to the other: a result becomes a block when a breakpoint is
    put on it.
    """
    if isinstance(content, list):
        return [respelled(one) if isinstance(one, dict) else one for one in content]
    if not isinstance(content, dict):
        return content
    if content.get("type") == "tool_result":
        fields = {name: value for name, value in sorted(content.items()) if value is not None}
        if fields.get("is_error") is False:
            del fields["is_error"]
        inner = fields.get("content")
        if isinstance(inner, list) and len(inner) == 1 and (text := text_of(inner[0])) is not None:
            fields["content"] = text
        return fields
    if content.get("type") == "tool_use":
        return dict(sorted(content.items()))
    if content.get("type") == "function" and isinstance(call := content.get("function"), dict):
        return {**dict(sorted(content.items())), "function": _call(call)}
    return content


def loosened(content: Any, text: str | None) -> bytes | None:
    """Return bytes that a part has in any spelling; None if ``content`` is spelled that way itself.

    Spellings differ in their spaces, in the order of a call's arguments, and in the ids of tool
    calls and items. To a reader they are the same; to the cache they are not.

    Args:
        content: the part's content, as `respelled` returns it.
        text: its text, if it is nothing but a text.
    """
    if text is not None:
        if len(text) > _MAX_LOOSENED or is_even(text):
            return None
        return b"t" + utf8(evened(text))
    if isinstance(content, str):
        return None
    return b"j" + packed_bytes(without_ids(content), sort_keys=True)


def without_ids(content: Any) -> Any:
    """Return a part's content without the ids of tool calls and items, and texts with their spaces
    evened out."""
    if isinstance(content, str):
        return content if len(content) > _MAX_LOOSENED else evened(content)
    if isinstance(content, list):
        return [without_ids(one) if isinstance(one, dict) else one for one in content]
    if not isinstance(content, dict):
        return content
    if content.get("type") in ("tool_use", "function") or "arguments" in content:
        # What a call says may look like an id and be none.
        return {name: value for name, value in content.items() if name not in _IDS}
    return {
        name: without_ids(value) if name in ("content", "text", "output") else value
        for name, value in content.items()
        if name not in _IDS
    }


def _call(function: Mapping[str, Any]) -> dict[str, Any]:
    call = dict(sorted(function.items()))
    if isinstance(arguments := call.get("arguments"), str):
        # Arguments that are not JSON stay a string: the server will refuse them.
        with suppress(ValueError, RecursionError):
            call["arguments"] = [json.loads(arguments)]
    return call


def text_of(content: Any) -> str | None:
    """Return the text of a string or of a bare text block: both render to the same prompt."""
    if isinstance(content, str):
        return content
    if isinstance(content, dict) and content.get("type") in _TEXT_TYPES and len(content) == 2:
        text = content.get("text")
        return text if isinstance(text, str) else None
    return None


def _strings(content: Any) -> bytes | None:
    """Return the bytes of an object of strings only, as most tool results are; None for any other.

    Each string follows its length, so nothing has to be escaped: several times faster than JSON,
    and tool results are most of a long conversation.
    """
    if type(content) is not dict:
        return None
    strings: list[str] = []
    for key, value in content.items():
        if type(value) is not str:
            return None
        strings += (f"{len(key)}:{len(value)}:", key, value)
    if any(map(is_long, strings)):
        return b"".join(map(utf8, strings))
    return "".join(strings).encode("utf-8", "surrogatepass")


def packed_bytes(value: Any, *, sort_keys: bool = False) -> bytes:
    """Return bytes that only ``value`` has, several times as fast as `json_bytes`."""
    try:
        return msgspec.msgpack.encode(value, order="sorted" if sort_keys else None)
    except (OverflowError, RecursionError, TypeError, ValueError):
        return json_bytes(value, sort_keys=sort_keys)


def json_bytes(value: Any, *, sort_keys: bool = False) -> bytes:
    """Return ``value`` as JSON bytes, whatever it holds: half a surrogate pair, any depth."""
    try:
        if not sort_keys:
            # Four times as fast as the standard library, but it refuses some values.
            return to_json(value)
    except (PydanticSerializationError, ValueError):
        pass
    try:
        encoder = _SORTED if sort_keys else _ORDERED
        return encoder.encode(value).encode("utf-8", "surrogatepass")
    except (RecursionError, TypeError, ValueError):
        return _flat(value, sort_keys)


def _flat(value: Any, sort_keys: bool) -> bytes:
    """Return bytes that differ for different values, without recursion."""
    out: list[bytes] = []
    stack: list[Any] = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, Mapping):
            items = list(item.items())
            if sort_keys:
                items.sort(key=lambda pair: str(pair[0]))
            out.append(b"{%d " % len(items))
            for key, inner in reversed(items):
                stack += (inner, str(key))
        elif isinstance(item, list | tuple):
            out.append(b"[%d " % len(item))
            stack += reversed(item)
        else:
            raw = repr(item).encode("utf-8", "surrogatepass")
            out.append(b"%d:" % len(raw) + raw)
    return b"".join(out)
