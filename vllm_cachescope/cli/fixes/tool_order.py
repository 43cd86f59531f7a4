"""One order for the tools: the one in which they first came, those that came later at the end."""

from collections.abc import Iterable
from typing import Any

from vllm_cachescope.cli.fixes.fix import Fix
from vllm_cachescope.cli.fixes.sent_body import SentBody
from vllm_cachescope.repair.tool_order import identities, in_order


def tool_order_fixes(bodies: Iterable[SentBody]) -> list[Fix]:
    """Return what puts the tools of all requests into one order. Breakpoints keep their places."""
    rank: dict[str, int] = {}
    fix = Fix("tool_order", "tools", "tools in one order, in which they first came")
    for body in bodies:
        tools = body.tools
        if (names := identities(tools)) is None:
            continue  # A cache point, two of one name.
        for name in names:
            rank.setdefault(name, len(rank))
        if (ordered := in_order(tools, rank)) is not None:

            def put(tools: list[Any] = tools, ordered: list[Any] = ordered) -> None:
                tools[:] = ordered

            fix.add(body.source, put)
    return [fix] if fix.edits else []
