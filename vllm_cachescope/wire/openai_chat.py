"""Reads the body of ``POST /v1/chat/completions`` (OpenAI's Chat Completions).

Markers: OpenAI's ``prompt_cache_breakpoint`` on content parts; Anthropic's ``cache_control`` on
tools, on content parts, once at the top level, and on a message whose content is a string (it has
no content part to carry one), where it ends the message. Unless strict, both are read wherever
clients put them: also in a tool's ``function``, on a message with content parts (it ends the last
of them), on a tool call (it ends the calls up to there), and on an empty result of a tool.
"""

from collections.abc import Collection, Mapping
from typing import Any

from vllm_cachescope.prompt.request import PromptRequest, Protocol, Region
from vllm_cachescope.wire.blocks import MARKERS
from vllm_cachescope.wire.openai import count_leading_system, finish
from vllm_cachescope.wire.parts import DEFAULT_TTL_S, PartCollector

_PARAMS = (
    "tool_choice",
    "reasoning_effort",
    "response_format",
    "chat_template",
    "chat_template_kwargs",
    "add_generation_prompt",
    "continue_final_message",
    "add_special_tokens",
    "truncate_prompt_tokens",
    "truncation_side",
    "media_io_kwargs",
    "mm_processor_kwargs",
)


def read(
    body: Mapping[str, Any],
    ttls: Collection[int],
    default_ttl_s: int = DEFAULT_TTL_S,
    strict: bool = False,
) -> PromptRequest:
    """Read a Chat Completions request.

    Leading messages of the roles ``system`` and ``developer`` are the system region. What a
    message holds besides its content is a part of its own: ``messages[i]`` (its name, its
    tool_call_id and the like) before the content, ``messages[i].tool_calls`` after it: the first
    call, and ``messages[i].tool_calls[1]`` and so on for the others.

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
    messages = body.get("messages")
    messages = messages if isinstance(messages, list) else []
    leading = count_leading_system(messages)
    for i, message in enumerate(messages[:leading]):
        _read_message(parts, Region.SYSTEM, f"messages[{i}]", message)
    # A template may render documents anywhere; they are never shared wider than messages.
    if body.get("documents") is not None:
        parts.add(Region.MESSAGES, "documents", body["documents"])
    for i, message in enumerate(messages[leading:], leading):
        _read_message(parts, Region.MESSAGES, f"messages[{i}]", message)
    parts.refuse(body.get("tool_choice"), "tool_choice")
    return finish(Protocol.CHAT, body, parts, _PARAMS, ttls, default_ttl_s)


def _read_message(parts: PartCollector, region: Region, path: str, message: object) -> None:
    if not isinstance(message, Mapping):
        parts.add(region, path, message)
        return
    role = message.get("role")
    role = role if isinstance(role, str) else None
    content, calls = message.get("content"), message.get("tool_calls")
    others = {
        key: value
        for key, value in message.items()
        if key not in ("role", "content", "tool_calls", *MARKERS) and value is not None
    }
    if others:
        parts.add(region, path, others, role)
    first = len(parts)
    if isinstance(content, list) and content:
        parts.refuse_dialect(message, path, "on the content parts of this message")
        for i, block in enumerate(content):
            parts.block(region, f"{path}.content[{i}]", block, role)
    elif "content" in message or not (others or calls):
        parts.add(region, f"{path}.content", content, role)
    if calls:
        parts.calls(region, f"{path}.tool_calls", calls, role)
    parts.end(message, path, first)
