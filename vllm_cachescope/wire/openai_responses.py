"""Reads the body of ``POST /v1/responses`` (OpenAI's Responses).

Markers: OpenAI's ``prompt_cache_breakpoint`` on content parts, those in a function call's output
included; Anthropic's ``cache_control`` there as well, on tools, on items, on messages whose
content is a string, and once at the top level. Unless strict, both are read wherever clients put
them: also on a message with content parts, where they end the last of them.
"""

from collections.abc import Collection, Mapping
from typing import Any

from vllm_cachescope.prompt.request import PromptRequest, Protocol, Region
from vllm_cachescope.wire.blocks import BREAKPOINT
from vllm_cachescope.wire.openai import count_leading_system, finish
from vllm_cachescope.wire.parts import DEFAULT_TTL_S, PartCollector

_PARAMS = (
    "tool_choice",
    "reasoning",
    "text",
    "truncation",
    "chat_template_kwargs",
    "media_io_kwargs",
    "mm_processor_kwargs",
)

# Earlier turns that the server puts before `input`.
HISTORY = ("previous_response_id", "previous_input_messages")


def read(
    body: Mapping[str, Any],
    ttls: Collection[int],
    default_ttl_s: int = DEFAULT_TTL_S,
    strict: bool = False,
) -> PromptRequest:
    """Read a Responses request.

    ``instructions`` and, unless earlier turns come before them, leading input messages of the
    roles ``system`` and ``developer`` are the system region.

    Args:
        body: the request's JSON object.
        ttls: the lifetimes a client may ask for, in seconds.
        default_ttl_s: the lifetime in seconds of a breakpoint that names none.
        strict: whether to refuse what is wrong with the cache's own fields. If not, it is ignored,
            or read narrower.

    Raises:
        BadRequest: if strict, for anything wrong with the cache's own fields. Whatever else is
            malformed is left to the server to refuse.
    """
    parts = PartCollector(ttls, breakpoints=True, strict=strict)
    parts.tools(body.get("tools"))
    if body.get("instructions"):
        parts.add(Region.SYSTEM, "instructions", body["instructions"])
    history = [name for name in HISTORY if body.get(name) is not None]
    for name in history:
        parts.add(Region.MESSAGES, name, body[name])
    given = body.get("input")
    if isinstance(given, list):
        leading = 0 if history else count_leading_system(given)
        for i, item in enumerate(given):
            region = Region.SYSTEM if i < leading else Region.MESSAGES
            _read_item(parts, region, f"input[{i}]", item)
    elif given is not None:
        parts.add(Region.MESSAGES, "input", given)
    for name in ("tool_choice", "reasoning", "text"):
        parts.refuse(body.get(name), name)
    return finish(Protocol.RESPONSES, body, parts, _PARAMS, ttls, default_ttl_s)


def _read_item(parts: PartCollector, region: Region, path: str, item: object) -> None:
    if not isinstance(item, Mapping):
        parts.add(region, path, item)
        return
    role = item.get("role")
    role = role if isinstance(role, str) else None
    content = item.get("content")
    # A reasoning item has a list called content too; only messages have a role.
    if role is None or "content" not in item:
        parts.refuse_dialect(item, path, "on content parts", kinds=(BREAKPOINT,))
        parts.block(region, path, item, role)
        return
    first = len(parts)
    if isinstance(content, list) and content:
        parts.refuse_dialect(item, path, "on the content parts of this message")
        for i, block in enumerate(content):
            parts.block(region, f"{path}.content[{i}]", block, role)
    else:
        parts.add(region, f"{path}.content", content, role)
    parts.end(item, path, first)
