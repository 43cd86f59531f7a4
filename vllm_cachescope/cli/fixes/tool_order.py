"""One order for the tools: the one in which they first came, those that came later at the end."""

from collections.abc import Iterable
from typing import Any

from vllm_cachescope.cli.fixes.fix import Fix
from vllm_cachescope.cli.fixes.sent_body import SentBody, tool_name

_MARKS = ("cache_control", "prompt_cache_breakpoint")


def tool_order_fixes(bodies: Iterable[SentBody]) -> list[Fix]:
    """Return what puts the tools of all requests into one order. Breakpoints keep their places."""
    rank: dict[str, int] = {}
    fix = Fix("tool_order", "tools", "tools in one order, in which they first came")
    for body in bodies:
        tools = body.tools
        names = [tool_name(tool) for tool in tools]
        known = [name for name in names if name is not None]
        if len(known) != len(names) or len(set(known)) != len(known):
            continue  # A built-in tool without a name, a cache point, two of one name.
        for name in known:
            rank.setdefault(name, len(rank))
        ranks = [rank[name] for name in known]
        if ranks != sorted(ranks):
            order = sorted(range(len(tools)), key=ranks.__getitem__)

            def put(tools: list[Any] = tools, order: list[int] = order) -> None:
                marks = [{k: tool.pop(k) for k in _MARKS if k in tool} for tool in tools]
                tools[:] = [tools[i] for i in order]
                for tool, mark in zip(tools, marks, strict=True):
                    tool |= mark

            fix.add(body.source, put)
    return [fix] if fix.edits else []
