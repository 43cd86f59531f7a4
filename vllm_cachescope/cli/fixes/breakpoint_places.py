"""Breakpoints where they pay: on the latest message, none too many, none on what is empty."""

from collections.abc import Iterable
from functools import partial
from typing import Any

from vllm_cachescope.cli.fixes.fix import Fix
from vllm_cachescope.cli.fixes.sent_body import SentBody
from vllm_cachescope.prompt.request import Protocol
from vllm_cachescope.wire.breakpoints import MAX_BREAKPOINTS

_MARK = "cache_control"
_GROWN = 3  # messages


def breakpoint_fixes(bodies: Iterable[SentBody]) -> list[Fix]:
    """Return what puts the ``cache_control`` of requests where it pays."""
    stuck = Fix("stuck_breakpoint", "messages", "a breakpoint on the latest message, too")
    many = Fix(
        "refused_request", "messages", "the latest four breakpoints, which are all that count"
    )
    empty = Fix("ignored_marker", "messages", "breakpoints from empty blocks to those before them")
    kept = [body for body in bodies if body.protocol in (Protocol.MESSAGES, Protocol.CHAT)]
    grows: dict[tuple[str | None, str], int] = {}
    for body in kept:
        key = body.conversation
        grows[key] = max(grows.get(key, 0), len(body.messages))
    for body in kept:
        for blocks in _lists(body):
            _from_empty(empty, body, blocks)
        marked = [block for block in _blocks(body) if block.get(_MARK) is not None]
        top = body.body.get(_MARK) is not None
        if body.protocol is Protocol.MESSAGES and len(marked) + top > MAX_BREAKPOINTS:
            for block in marked[: len(marked) + top - MAX_BREAKPOINTS]:
                many.add(body.source, partial(block.pop, _MARK, None))
        inside = [block for block in _message_blocks(body) if block.get(_MARK) is not None]
        room = marked and not inside and not top and len(marked) < MAX_BREAKPOINTS
        if room and grows[body.conversation] >= _GROWN:
            stuck.add(body.source, partial(_mark_last, body))
    return [fix for fix in (empty, many, stuck) if fix.edits]


def _from_empty(fix: Fix, body: SentBody, blocks: list[Any]) -> None:
    for before, block in zip([None, *blocks], blocks, strict=False):
        if not isinstance(block, dict) or block.get(_MARK) is None:
            continue
        if block.get("type") == "text" and not str(block.get("text") or "").strip():

            def put(before: Any = before, block: dict[str, Any] = block) -> None:
                mark = block.pop(_MARK, None)
                if isinstance(before, dict) and mark is not None:
                    before.setdefault(_MARK, mark)

            fix.add(body.source, put)


def _mark_last(body: SentBody) -> None:
    last = body.messages[-1]
    content = last.get("content") if isinstance(last, dict) else None
    if isinstance(content, str) and content:
        last["content"] = [{"type": "text", "text": content, _MARK: {"type": "ephemeral"}}]
    elif isinstance(content, list) and content and isinstance(content[-1], dict):
        content[-1][_MARK] = {"type": "ephemeral"}


def _lists(body: SentBody) -> list[list[Any]]:
    contents = [body.body.get("system")]
    contents += [one.get("content") for one in body.messages if isinstance(one, dict)]
    return [content for content in contents if isinstance(content, list)]


def _blocks(body: SentBody) -> list[dict[str, Any]]:
    """Return what may carry a breakpoint, in prompt order."""
    system = body.body.get("system")
    blocks = [*body.tools, *(system if isinstance(system, list) else [])]
    return [*(block for block in blocks if isinstance(block, dict)), *_message_blocks(body)]


def _message_blocks(body: SentBody) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    for message in body.messages:
        if not isinstance(message, dict) or message.get("role") in ("system", "developer"):
            continue
        content = message.get("content")
        blocks += (one for one in (content if isinstance(content, list) else ()) if _is(one))
        blocks.append(message)
    return blocks


def _is(block: Any) -> bool:
    return isinstance(block, dict)
