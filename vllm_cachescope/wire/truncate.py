"""Cuts a request off after one of its parts, to find where that part ends in the tokens."""

import re
from collections.abc import Mapping
from typing import Any

from vllm_cachescope.prompt.request import Part, Protocol, Region
from vllm_cachescope.wire.openai import count_leading_system

# The fields that hold parts, in prompt order. The last is the conversation, which may begin with
# messages that belong to the system region.
_FIELDS = {
    Protocol.MESSAGES: ("tools", "system", "messages"),
    Protocol.CHAT: ("tools", "documents", "messages"),
    Protocol.RESPONSES: (
        "tools",
        "instructions",
        "previous_response_id",
        "previous_input_messages",
        "input",
    ),
}

_PATH = re.compile(r"(\w+)(?:\[(\d+)\])?(?:\.(content|tool_calls)(?:\[(\d+)\])?)?")


def truncate(body: Mapping[str, Any], protocol: Protocol, after: Part) -> dict[str, Any]:
    """Return ``body`` without everything that comes after ``after``.

    What the prompt needs besides its parts (the model, template arguments and the like) stays.
    The result may have no messages left, and then is no request the server would accept.

    Args:
        body: the request's JSON object, without markers (`strip`); it is not changed.
        protocol: its wire format.
        after: a part that the format's ``read`` made of this ``body``, with or without markers.
    """
    truncated = dict(body)
    match = _PATH.fullmatch(after.path)
    if protocol is Protocol.COMPLETIONS or match is None:
        return truncated
    *fields, conversation = _FIELDS[protocol]
    field, index = match[1], None if match[2] is None else int(match[2])
    # It means the final message, which is cut off; vLLM refuses it where there is no message.
    truncated.pop("continue_final_message", None)

    if field == conversation:
        later = ["documents"] if after.region is Region.SYSTEM else []
        if index is not None:
            truncated[field] = truncated[field][: index + 1]
            truncated[field][-1] = _truncated_message(
                truncated[field][-1], protocol, match[3], match[4]
            )
    else:
        later = fields[fields.index(field) + 1 :]
        leading = count_leading_system(truncated.get(conversation)) if field == "documents" else 0
        truncated[conversation] = truncated[conversation][:leading] if leading else []
        if index is not None:
            truncated[field] = truncated[field][: index + 1]
        if field == "tools":
            _drop_unmet_choice(truncated)
    for name in later:
        truncated.pop(name, None)
    return truncated


def _truncated_message(
    message: Any, protocol: Protocol, field: str | None, index: str | None
) -> Any:
    if not isinstance(message, Mapping):
        return message
    if field == "tool_calls" and isinstance(message["tool_calls"], list):
        # The part without a number is the first call.
        message = {**message, "tool_calls": message["tool_calls"][: int(index or 0) + 1]}
    elif field == "content":
        message = {key: value for key, value in message.items() if key != "tool_calls"}
        if index is not None:
            message["content"] = message["content"][: int(index) + 1]
    elif field is None and protocol is Protocol.CHAT:
        # The part ``messages[i]`` is what the message holds besides its other parts.
        return {key: value for key, value in message.items() if key not in _OWN_PARTS}
    return message


_OWN_PARTS = ("content", "tool_calls")


def _drop_unmet_choice(body: dict[str, Any]) -> None:
    """vLLM refuses a choice of a tool that is not in the list."""
    chosen = _name(body.get("tool_choice"))
    if isinstance(chosen, str) and chosen not in [_name(tool) for tool in body["tools"]]:
        del body["tool_choice"]


def _name(tool: object) -> object:
    """The name in a tool or a choice of one: Chat has it under ``function``."""
    if not isinstance(tool, Mapping):
        return None
    function = tool.get("function")
    return (function if isinstance(function, Mapping) else tool).get("name")
