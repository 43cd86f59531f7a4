"""The usage in answers of a server, streamed or not, as counts of tokens."""

import json
from collections.abc import Iterable
from typing import Any

from vllm_cachescope.prompt.request import Protocol


def counts(protocol: Protocol, usage: dict[str, Any]) -> tuple[int, int, int]:
    """Return the tokens of a prompt, those read and those created."""
    if protocol is Protocol.MESSAGES:
        read, created = usage["cache_read_input_tokens"], usage["cache_creation_input_tokens"]
        return usage["input_tokens"] + read + created, read, created
    name = "input_tokens" if protocol is Protocol.RESPONSES else "prompt_tokens"
    details = usage[f"{name}_details"]
    return usage[name], details["cached_tokens"], details["cache_write_tokens"]


def last_usage(lines: Iterable[str]) -> dict[str, Any] | None:
    """Return the last usage in an answer, one JSON object or a stream of events; None if there is
    none."""
    found = None
    for line in lines:
        if '"usage"' not in line:
            continue
        data = json.loads(line.removeprefix("data: "))
        for holder in (data, data.get("message"), data.get("response")):
            if holder and holder.get("usage"):
                found = holder["usage"]
    return found
