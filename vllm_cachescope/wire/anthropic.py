"""Reads the body of ``POST /v1/messages`` (Anthropic's Messages).

The rules are those of the `anthropic` package's types and of Anthropic's prompt caching guide;
``cache_control.scope`` is the extension Claude Code uses with its own service, plus ``session``.
"""

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from vllm_cachescope.prompt.ignored_marker import IgnoredReason
from vllm_cachescope.prompt.request import PromptRequest, Protocol, Region
from vllm_cachescope.wire.fields import is_text, read_text
from vllm_cachescope.wire.parts import DEFAULT_TTL_S, PartCollector
from vllm_cachescope.wire.session_end import read_session_over

_PARAMS = (
    "tool_choice",
    "thinking",
    "output_config",
    "chat_template_kwargs",
)

# Objects of the body on which a client may put a marker by mistake.
_UNMARKABLE = ("metadata", "tool_choice", "thinking", "output_config")

# Claude Code wrote user_<hash>_account_<uuid>_session_<uuid> before it wrote JSON.
_SESSION = re.compile(r"_session_([0-9a-fA-F-]{36})\Z")
_MAX_USER_ID = 4096


def read(
    body: Mapping[str, Any],
    ttls: Collection[int],
    default_ttl_s: int = DEFAULT_TTL_S,
    strict: bool = True,
) -> PromptRequest:
    """Read a Messages request.

    Args:
        body: the request's JSON object.
        ttls: the lifetimes a client may ask for, in seconds.
        default_ttl_s: the lifetime in seconds of a breakpoint that names none.
        strict: whether to refuse what is wrong with the cache's own fields, as Anthropic's API
            does. If not, it is ignored, or read narrower.

    Raises:
        BadRequest: if strict, for anything wrong with the cache's own fields. Whatever else is
            malformed is left to the server to refuse.
    """
    parts = PartCollector(ttls, breakpoints=False, strict=strict)
    parts.tools(body.get("tools"))
    _read_content(parts, Region.SYSTEM, "system", body.get("system"), None)
    messages = body.get("messages")
    for i, message in enumerate(messages if isinstance(messages, list) else ()):
        path = f"messages[{i}]"
        if not isinstance(message, Mapping):
            parts.add(Region.MESSAGES, path, message)
            continue
        parts.refuse_dialect(message, path)
        first, role = len(parts), message.get("role")
        _read_content(
            parts,
            Region.MESSAGES,
            f"{path}.content",
            message.get("content"),
            role if isinstance(role, str) else None,
        )
        parts.end(message, path, first)
    for name in _UNMARKABLE:
        parts.refuse(body.get(name), name)
    marked = parts.settle(body.get("cache_control"), default_ttl_s)

    diagnostics, max_tokens, model = (
        body.get(name) for name in ("diagnostics", "max_tokens", "model")
    )
    previous_id = None
    if diagnostics is not None:
        keys, option = ("previous_message_id",), IgnoredReason.OPTION
        fields = parts.mistakes.read_object(diagnostics, "diagnostics", keys, option) or {}
        path = "diagnostics.previous_message_id"
        previous_id = parts.mistakes.read(option, read_text, fields.get(keys[0]), path)
    return PromptRequest(
        protocol=Protocol.MESSAGES,
        model=model if isinstance(model, str) else "",
        parts=marked.parts,
        automatic=not marked.controlled,
        session=_session(body),
        session_over=read_session_over(body, parts.mistakes),
        prewarm=type(max_tokens) is int and max_tokens == 0,
        params={name: body[name] for name in _PARAMS if body.get(name) is not None},
        diagnose=diagnostics is not None,
        previous_id=previous_id,
        ignored=tuple(parts.mistakes.ignored),
    )


def _read_content(
    parts: PartCollector, region: Region, path: str, content: object, role: str | None
) -> None:
    if isinstance(content, list) and content:
        for i, block in enumerate(content):
            parts.block(region, f"{path}[{i}]", block, role)
    elif content or region is Region.MESSAGES:
        parts.add(region, path, content, role)


def _session(body: Mapping[str, Any]) -> str | None:
    session, metadata = body.get("session_id"), body.get("metadata")
    if isinstance(session, str) and is_text(session):
        return session
    user_id = metadata.get("user_id") if isinstance(metadata, Mapping) else None
    if not isinstance(user_id, str) or len(user_id) > _MAX_USER_ID:
        return None
    if match := _SESSION.search(user_id):
        return match[1]
    try:
        fields = json.loads(user_id)
    except (ValueError, RecursionError):
        return None
    session = fields.get("session_id") if isinstance(fields, Mapping) else None
    return session if isinstance(session, str) and is_text(session) else None
