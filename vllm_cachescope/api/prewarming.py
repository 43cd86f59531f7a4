"""Pre-warming: a request that fills the cache and generates nothing.

Anthropic's clients ask for it with ``max_tokens: 0``, OpenAI's with
``prompt_cache_options.prewarm``. A server cannot generate nothing: it is asked for one token, in
one piece, and the token is dropped from its reply.
"""

import json
from collections.abc import Iterator
from typing import Any


def one_token_body(body: dict[str, Any]) -> dict[str, Any]:
    """Return the body of a request for one token of what ``body`` asks to be pre-warmed."""
    limit = "max_output_tokens" if "input" in body else "max_tokens"
    filling = {**body, limit: 1, "stream": False}
    thinking = body.get("thinking")
    if isinstance(thinking, dict) and thinking.get("type") == "enabled":
        # Its budget has to be less than the limit. The prompt is the same without.
        del filling["thinking"]
    return filling


def drop_token(reply: dict[str, Any]) -> None:
    """Make the reply to a request for one token say that nothing was generated."""
    if reply.get("object") == "response":
        reply["output"] = []
        reply["status"], reply["incomplete_details"] = "completed", None
        reply["usage"]["total_tokens"] = reply["usage"].get("input_tokens", 0)
    else:
        reply["content"] = []
        reply["stop_reason"], reply["stop_sequence"] = "max_tokens", None
    reply["usage"]["output_tokens"] = 0


def stream_of(reply: dict[str, Any]) -> Iterator[bytes]:
    """Yield the server-sent events that say what a pre-warming's whole reply says."""
    events: tuple[dict[str, Any], ...]
    if reply.get("object") == "response":
        started = {**reply, "status": "in_progress", "usage": None}
        events = (
            {"type": "response.created", "sequence_number": 0, "response": started},
            {"type": "response.completed", "sequence_number": 1, "response": reply},
        )
    else:
        started = {**reply, "stop_reason": None, "stop_sequence": None}
        delta = {"stop_reason": reply["stop_reason"], "stop_sequence": None}
        events = (
            {"type": "message_start", "message": started},
            {"type": "message_delta", "delta": delta, "usage": reply["usage"]},
            {"type": "message_stop"},
        )
    for event in events:
        data = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
        yield f"event: {event['type']}\ndata: {data}\n\n".encode()
