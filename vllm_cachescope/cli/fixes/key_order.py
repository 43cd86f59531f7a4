"""One order for the keys of each tool, for its sets, and for the inputs of earlier tool calls.

The first order that was seen is kept. JSON gives the order of keys no meaning, nor JSON Schema that
of ``required``, ``enum`` and ``type``.
"""

import json
from collections.abc import Iterable
from typing import Any

from vllm_cachescope.cli.fixes.fix import Fix
from vllm_cachescope.cli.fixes.sent_body import SentBody, tool_name

_SETS = ("required", "enum", "type")
_MARKS = ("cache_control", "prompt_cache_breakpoint")


def tool_fixes(bodies: Iterable[SentBody]) -> list[Fix]:
    """Return what gives each tool the order of its first request."""
    first: dict[tuple[str, str], str] = {}
    fixes: dict[str, Fix] = {}
    for body in bodies:
        for i, tool in enumerate(body.tools):
            name = tool_name(tool)
            if name is None:
                continue
            bare = {key: value for key, value in tool.items() if key not in _MARKS}
            text = json.dumps(bare)
            known = first.setdefault((name, _unordered(bare)), text)
            if known != text:
                fix = fixes.setdefault(
                    name,
                    Fix("unsorted_json", f"tools.{name}", "keys and sets in one order, its first"),
                )
                tools = body.tools

                def put(tools: list[Any] = tools, i: int = i, known: str = known) -> None:
                    kept = {k: v for k, v in tools[i].items() if k in _MARKS}
                    tools[i] = {**json.loads(known), **kept}

                fix.add(body.source, put)
    return list(fixes.values())


def call_fixes(bodies: Iterable[SentBody]) -> list[Fix]:
    """Return what gives the input of each earlier tool call the order in which it first came."""
    first: dict[tuple[str, str], str] = {}
    fix = Fix(
        "call_keys_reordered",
        "messages",
        "inputs of earlier tool calls in one key order, the first",
    )
    for body in bodies:
        for owner, key, name in _inputs(body):
            value = owner[key]
            parsed = _parsed(value)
            text = value if isinstance(value, str) else json.dumps(value)
            known = first.setdefault((name, _unordered(parsed, sets=False)), text)
            if known != text:

                def put(owner: Any = owner, key: str = key, known: str = known) -> None:
                    owner[key] = known if isinstance(owner[key], str) else json.loads(known)

                fix.add(body.source, put)
    return [fix] if fix.edits else []


def _inputs(body: SentBody) -> Iterable[tuple[dict[str, Any], str, str]]:
    """Yield each input of a tool call: what holds it, under which key, and the call's id."""
    for message in body.messages:
        if not isinstance(message, dict):
            continue
        if "arguments" in message:
            yield message, "arguments", str(message.get("call_id"))
        content, calls = message.get("content"), message.get("tool_calls")
        for block in content if isinstance(content, list) else ():
            if isinstance(block, dict) and block.get("type") == "tool_use" and "input" in block:
                yield block, "input", str(block.get("id"))
        for call in calls if isinstance(calls, list) else ():
            function = call.get("function") if isinstance(call, dict) else None
            if isinstance(function, dict) and "arguments" in function:
                yield function, "arguments", str(call.get("id"))


def _parsed(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _unordered(value: Any, sets: bool = True) -> str:
    return json.dumps(_evened(value) if sets else value, sort_keys=True)


def _evened(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: sorted(inner, key=str)
            if key in _SETS and isinstance(inner, list) and not any(map(_is_nested, inner))
            else _evened(inner)
            for key, inner in value.items()
        }
    return [_evened(one) for one in value] if isinstance(value, list) else value


def _is_nested(value: Any) -> bool:
    return isinstance(value, dict | list)
