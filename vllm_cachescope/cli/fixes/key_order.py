"""One order for the keys of each tool, for its sets, and for the inputs of earlier tool calls.

The first order that was seen is kept. JSON gives the order of keys no meaning, nor JSON Schema that
of ``required``, ``enum`` and ``type``.
"""

import json
from collections.abc import Iterable
from typing import Any

from vllm_cachescope.cli.fixes.fix import Fix
from vllm_cachescope.cli.fixes.sent_body import SentBody
from vllm_cachescope.repair.editable_body import tool_name
from vllm_cachescope.repair.spelling import (
    input_in_any_spelling,
    parsed_exactly,
    tool_in_any_spelling,
)
from vllm_cachescope.wire.blocks import MARKERS


def tool_fixes(bodies: Iterable[SentBody]) -> list[Fix]:
    """Return what gives each tool the order of its first request."""
    first: dict[tuple[str, bytes], str] = {}
    fixes: dict[str, Fix] = {}
    for body in bodies:
        for i, tool in enumerate(body.tools):
            name = tool_name(tool)
            if name is None:
                continue
            bare = {key: value for key, value in tool.items() if key not in MARKERS}
            try:
                alike = tool_in_any_spelling(bare)
            except (ValueError, RecursionError):
                continue
            text = json.dumps(bare)
            known = first.setdefault((name, alike), text)
            if known != text:
                fix = fixes.setdefault(
                    name,
                    Fix("unsorted_json", f"tools.{name}", "keys and sets in one order, its first"),
                )
                tools = body.tools

                def put(tools: list[Any] = tools, i: int = i, known: str = known) -> None:
                    kept = {k: v for k, v in tools[i].items() if k in MARKERS}
                    tools[i] = {**json.loads(known), **kept}

                fix.add(body.source, put)
    return list(fixes.values())


def call_fixes(bodies: Iterable[SentBody]) -> list[Fix]:
    """Return what gives the input of each earlier tool call the order in which it first came."""
    first: dict[tuple[str, bytes], str] = {}
    fix = Fix(
        "call_keys_reordered",
        "messages",
        "inputs of earlier tool calls in one key order, the first",
    )
    for body in bodies:
        for call in body.tool_inputs():
            owner, key = call.owner, call.key
            value = owner[key]
            try:
                parsed = parsed_exactly(value) if isinstance(value, str) else value
                alike = input_in_any_spelling(parsed)
            except (ValueError, RecursionError):
                continue
            text = value if isinstance(value, str) else json.dumps(value)
            known = first.setdefault((call.call, alike), text)
            if known != text:

                def put(owner: Any = owner, key: str = key, known: str = known) -> None:
                    owner[key] = known if isinstance(owner[key], str) else json.loads(known)

                fix.add(body.source, put)
    return [fix] if fix.edits else []
