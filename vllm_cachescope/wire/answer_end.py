"""The end of an answer, as the reply tells it in each format."""

import re

# Quotes inside of strings are escaped: no text of a model's can look like this.
_REASON = re.compile(rb'"(?:finish_reason|stop_reason|stopReason)":\s*"(\w+)"')
_CALL = re.compile(rb'"type":\s*"function_call"')
_COMPLETED = re.compile(rb'"status":\s*"completed"')

_TOOLS = frozenset({b"tool_calls", b"tool_use", b"function_call", b"pause_turn"})
_ANSWER = frozenset({b"stop", b"end_turn", b"stop_sequence"})


def waits_for_tools(data: bytes, is_responses: bool = False) -> bool | None:
    """Return whether an answer ends in a call of a tool (true), or the turn is over (false), from a
    reply's JSON or an event of it; None if it does not say, or was cut off.

    Args:
        data: the JSON, as the server wrote it.
        is_responses: whether it is of OpenAI's Responses, which name no reason.
    """
    if is_responses:
        if not _COMPLETED.search(data) or b'"output"' not in data:
            return None
        return bool(_CALL.search(data))
    reasons = set(_REASON.findall(data))
    if reasons & _TOOLS:
        return True
    return False if reasons & _ANSWER else None
