"""LiteLLM's logs: its standard logging payload, and the rows of its spend logs."""

import json
from collections.abc import Mapping
from typing import Any

from vllm_cachescope.cli.traffic.call import Usage
from vllm_cachescope.cli.traffic.endings import ending_in, reasons_of
from vllm_cachescope.cli.traffic.envelope import Envelope, as_body, text_of
from vllm_cachescope.cli.traffic.times import seconds_of
from vllm_cachescope.cli.traffic.usage import response_id_in, usage_in

_KINDS = ("completion", "messages", "responses", "text_completion")


def is_record(record: Mapping[str, Any]) -> bool:
    """Whether a line is one of LiteLLM's."""
    return "call_type" in record and ("startTime" in record or "messages" in record)


def envelope(record: Mapping[str, Any]) -> Envelope | None:
    """Return the request in a line; None if it is of a call that takes no prompt.

    The body is what the client had sent, where the proxy kept it (``proxy_server_request``);
    otherwise the messages and the parameters that it logs.
    """
    if not any(kind in str(record.get("call_type")) for kind in _KINDS):
        return None
    metadata = record.get("metadata")
    metadata = metadata if isinstance(metadata, Mapping) else {}
    return Envelope(
        _body(record),
        seconds_of(record.get("startTime")),
        text_of(record.get("session_id"))
        or text_of(metadata.get("session_id"))
        or text_of(record.get("trace_id")),
        response_id=response_id_in(record.get("response")) or text_of(record.get("id")),
        usage=_usage(record, metadata),
        ended=ending_in(record.get("response"), reasons_of(record)),
    )


def _body(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    sent = as_body(record.get("proxy_server_request"))
    if sent is not None:
        inner = as_body(sent.get("body"))
        sent = sent if inner is None else inner
        if any(key in sent for key in ("messages", "input", "prompt")):
            return sent
    messages = record.get("messages")
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError):
            messages = [{"role": "user", "content": messages}]
    if not messages:
        return None  # Prompts are only logged where the operator asks for it.
    if isinstance(messages, Mapping):
        return messages
    parameters = as_body(record.get("model_parameters")) or {}
    return {**parameters, "model": record.get("model"), "messages": messages}


def _usage(record: Mapping[str, Any], metadata: Mapping[str, Any]) -> Usage | None:
    return (
        usage_in({"usage": metadata.get("usage_object")})
        or usage_in(record.get("response"))
        or usage_in(record)
    )
