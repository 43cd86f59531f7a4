"""What a recorded response says of the cache: the usage in it, in whichever format."""

import json
from collections.abc import Mapping
from typing import Any

from vllm_cachescope.cli.traffic.call import Usage

_MAX_EVENTS = 10_000


def usage_in(response: object) -> Usage | None:
    """Return the usage in a response; None if it tells nothing of the cache.

    Args:
        response: the response's body as an object or as text, a stream of events included; or an
            object that holds it as ``body`` or ``response``.
    """
    if isinstance(response, str):
        return _usage_in_text(response)
    if not isinstance(response, Mapping):
        return None
    if (found := read_usage(response.get("usage"))) is not None:
        return found
    for key in ("body", "response", "message", "content"):
        if isinstance(inner := response.get(key), Mapping | str) and (found := usage_in(inner)):
            return found
    return None


def response_id_in(response: object) -> str | None:
    """Return the id of a response; None if there is none."""
    if not isinstance(response, Mapping):
        return None
    if isinstance(named := response.get("id"), str) and named:
        return named
    return response_id_in(response.get("body"))


def read_usage(usage: object) -> Usage | None:
    """Return a ``usage`` object of Messages, Chat, Responses, Converse or DeepSeek; None if it
    does not say how much was read."""
    if not isinstance(usage, Mapping):
        return None
    # Anthropic and Bedrock count what was read or written beside `input_tokens`.
    for new, read, created in (
        ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"),
        ("inputTokens", "cacheReadInputTokens", "cacheWriteInputTokens"),
    ):
        if (was_read := _count(usage.get(read))) is not None:
            rest, written = _count(usage.get(new)) or 0, _count(usage.get(created))
            return Usage(rest + was_read + (written or 0), was_read, written)
    for total, details in (
        ("prompt_tokens", "prompt_tokens_details"),
        ("input_tokens", "input_tokens_details"),
    ):
        inner, tokens = usage.get(details), _count(usage.get(total))
        if isinstance(inner, Mapping) and tokens:
            was_read = _count(inner.get("cached_tokens"))
            if was_read is not None:
                return Usage(tokens, min(was_read, tokens), _count(inner.get("cache_write_tokens")))
    tokens, was_read = (
        _count(usage.get("prompt_tokens")),
        _count(usage.get("prompt_cache_hit_tokens")),
    )
    if tokens and was_read is not None:
        return Usage(tokens, min(was_read, tokens))
    return None


def _usage_in_text(text: str) -> Usage | None:
    """Return the usage in a body as text: JSON, or server-sent events, of which the fullest
    counts."""
    if text.lstrip().startswith("{"):
        parsed = _parsed(text)
        return usage_in(parsed) if isinstance(parsed, Mapping) else None
    best: Usage | None = None
    for line in text.splitlines()[:_MAX_EVENTS]:
        if not line.startswith("data:") or "usage" not in line:
            continue
        event = _parsed(line[5:])
        found = usage_in(event) if isinstance(event, Mapping) else None
        if found is not None and (best is None or found.prompt_tokens >= best.prompt_tokens):
            best = found
    return best


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _count(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**53:
        return None
    return value
