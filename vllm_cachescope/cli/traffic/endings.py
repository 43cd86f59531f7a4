"""How recorded answers ended, by the reasons that responses name."""

import json
from collections.abc import Mapping
from typing import Any

from vllm_cachescope.cache.runs import Ended
from vllm_cachescope.wire.answer_end import waits_for_tools

_MAX_EVENTS = 10_000
_REASONS = ("finish_reason", "stop_reason", "stopReason")


def ending_in(*responses: object) -> Ended | None:
    """Return how an answer ended, as a server of ours would have told its policy; None if that is
    not said, the answer was cut off, or it was not recorded.

    Args:
        responses: what may say it: a response as an object, or its body as text, a stream of events
            included. The first that does counts.
    """
    return next((one for one in map(_ending_in, responses) if one is not None), None)


def _ending_in(response: object) -> Ended | None:
    if isinstance(response, str):
        text = response
    elif isinstance(response, Mapping):
        body = response.get("body")
        if isinstance(body, str):
            return _ending_in(body)
        text = json.dumps(response)
    else:
        return None
    found: Ended | None = None
    for event in text.replace("\r\n", "\n").split("\n\n")[-_MAX_EVENTS:]:
        data = event.encode("utf-8", "replace")
        waits = waits_for_tools(data)
        if waits is None:
            waits = waits_for_tools(data, is_responses=True) if _is_responses(data) else None
        if waits:
            return Ended.TOOLS
        found = found if waits is None else Ended.ANSWER
    return found


def reasons_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the reasons that a recorder noted beside a response."""
    return {name: record[name] for name in _REASONS if isinstance(record.get(name), str)}


def _is_responses(data: bytes) -> bool:
    compact = data.replace(b": ", b":")
    return b'"object":"response"' in compact or b'"type":"response.completed"' in compact
