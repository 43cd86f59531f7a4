"""Spans of calls to language models: OpenTelemetry's GenAI conventions, and those before them.

A span is one of an OTLP export (``resourceSpans``), as collectors and OpenRouter's Broadcast write
it, or one that an exporter printed by itself. Its attributes hold the prompt as JSON
(``gen_ai.input.messages``, ``gen_ai.prompt``), or one attribute a field, as OpenLLMetry
(``gen_ai.prompt.0.content``) and OpenInference (``llm.input_messages.0.message.content``) have it.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from vllm_cachescope.cli.traffic.call import Usage
from vllm_cachescope.cli.traffic.endings import ending_in
from vllm_cachescope.cli.traffic.envelope import Envelope, text_of
from vllm_cachescope.cli.traffic.times import seconds_of

_SESSIONS = ("gen_ai.conversation.id", "session.id", "langfuse.session.id", "session_id")
_MODELS = ("gen_ai.request.model", "llm.model_name", "gen_ai.response.model")
_READ = (
    "gen_ai.usage.cache_read.input_tokens",
    "gen_ai.usage.cache_read_input_tokens",
    "gen_ai.usage.input_tokens.cached",
    "llm.token_count.prompt_details.cache_read",
)
_INPUT = ("gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens", "llm.token_count.prompt")
_STARTS = ("startTimeUnixNano", "start_time_unix_nano", "start_time", "startTime")
_MAX_INDEX = 100_000


def is_record(record: Mapping[str, Any]) -> bool:
    """Whether a line is an export of spans, or a span."""
    if isinstance(record.get("resourceSpans"), list):
        return True
    named = any(key in record for key in ("traceId", "trace_id", "context", "span_id", "spanId"))
    return named and isinstance(record.get("attributes"), Mapping | list)


def envelopes(record: Mapping[str, Any]) -> Iterator[Envelope]:
    """Yield the requests in a line: of the spans that hold a prompt."""
    for span in _spans(record):
        attributes = _attributes(span.get("attributes"))
        if (body := _body(attributes)) is not None:
            context = span.get("context")
            context = context if isinstance(context, Mapping) else {}
            trace = (span.get("traceId"), span.get("trace_id"), context.get("trace_id"))
            named = [attributes.get(key) for key in _SESSIONS]
            yield Envelope(
                body,
                next((at for key in _STARTS if (at := seconds_of(span.get(key)))), None),
                next((one for value in (*named, *trace) if (one := text_of(value))), None),
                response_id=text_of(attributes.get("gen_ai.response.id")),
                usage=_usage(attributes),
                ended=ending_in({"choices": _reasons(attributes)}),
            )


def _reasons(attributes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return why the model stopped, as choices of a reply."""
    found = attributes.get("gen_ai.response.finish_reasons")
    if isinstance(found, str):  # Some write a list, and some one as JSON in a string.
        try:
            found = json.loads(found)
        except (ValueError, RecursionError):
            found = [found]
    names = {"tool_call": "tool_calls"}
    reasons = found if isinstance(found, list) else [found]
    return [{"finish_reason": names.get(one, one)} for one in reasons[:64] if isinstance(one, str)]


def _spans(record: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if "resourceSpans" not in record:
        yield record
        return
    for resource in _mappings(record["resourceSpans"]):
        scopes = resource.get("scopeSpans") or resource.get("instrumentationLibrarySpans")
        for scope in _mappings(scopes):
            yield from _mappings(scope.get("spans"))


def _mappings(value: object) -> list[Mapping[str, Any]]:
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []


def _attributes(value: object) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {str(key): one for key, one in value.items()}
    return {str(one.get("key")): _plain(one.get("value")) for one in _mappings(value)}


def _plain(value: Any) -> Any:
    """Return a value as OTLP writes it (``{"stringValue": …}``) as plain JSON."""
    if not isinstance(value, Mapping):
        return value
    for key, inner in value.items():
        if key == "intValue":
            return int(inner) if str(inner).lstrip("-").isdigit() else None
        if key in ("stringValue", "boolValue", "doubleValue"):
            return inner
        if key == "arrayValue" and isinstance(inner, Mapping):
            return [_plain(one) for one in inner.get("values") or []]
        if key == "kvlistValue" and isinstance(inner, Mapping):
            return _attributes(inner.get("values"))
    return None


def _body(attributes: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the prompt in a span as a body of Messages or Chat; None without a prompt."""
    model = next((one for key in _MODELS if (one := text_of(attributes.get(key)))), "")
    messages = _json(attributes.get("gen_ai.input.messages"))
    tools = _json(attributes.get("gen_ai.tool.definitions"))
    if isinstance(messages, list):
        system = _json(attributes.get("gen_ai.system_instructions"))
        return {
            "model": model,
            "tools": [_tool(tool) for tool in _mappings(tools)],
            "system": [_part(part) for part in _mappings(system)],
            "messages": [_message(message) for message in _mappings(messages)],
        }
    prompt = _json(attributes.get("gen_ai.prompt"))
    if isinstance(prompt, Mapping) and isinstance(prompt.get("messages"), list):
        return {"model": model, **prompt}
    if isinstance(prompt, list):
        return {"model": model, "messages": prompt, "tools": tools}
    for prefix in ("gen_ai.prompt.", "llm.input_messages."):
        if found := _indexed(attributes, prefix):
            said = [one.get("message", one) for one in _mappings(found)]
            sent = tools or _indexed(attributes, "llm.request.functions.")
            return {"model": model, "messages": said, "tools": sent or None}
    return None


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    fields = {key: value for key, value in tool.items() if key != "type"}
    return {("input_schema" if key == "parameters" else key): one for key, one in fields.items()}


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    parts = message.get("parts")
    content = [_part(part) for part in _mappings(parts)] if parts else message.get("content")
    return {"role": message.get("role"), "content": content}


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    """Return a part of a message as Messages spells it."""
    kind = part.get("type")
    if kind == "text":
        return {"type": "text", "text": part.get("content")}
    if kind == "tool_call":
        call = {"id": part.get("id"), "name": part.get("name"), "input": part.get("arguments")}
        return {"type": "tool_use", **call}
    if kind == "tool_call_response":
        result = part.get("response", part.get("result"))
        return {"type": "tool_result", "tool_use_id": part.get("id"), "content": result}
    return dict(part)


def _indexed(attributes: Mapping[str, Any], prefix: str) -> list[Any]:
    """Return a list that is spread over attributes such as ``prefix0.role``."""
    root: dict[str, Any] = {}
    for key, value in attributes.items():
        if key.startswith(prefix):
            at, names = root, key[len(prefix) :].split(".")
            for name in names[:-1]:
                inner = at.setdefault(name, {})
                at = inner if isinstance(inner, dict) else {}
            at[names[-1]] = value
    listed = _listed(root)
    return listed if isinstance(listed, list) else []


def _listed(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    inner = {key: _listed(one) for key, one in value.items()}
    if inner and all(key.isdigit() and int(key) < _MAX_INDEX for key in inner):
        return [inner[key] for key in sorted(inner, key=int)]
    return inner


def _json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None


def _usage(attributes: Mapping[str, Any]) -> Usage | None:
    read = next((one for key in _READ if isinstance(one := attributes.get(key), int)), None)
    total = next((one for key in _INPUT if isinstance(one := attributes.get(key), int)), None)
    if read is None or not total or read < 0:
        return None
    # The convention counts what was read in the input; some instrumentations do not.
    return Usage(total if total >= read else total + read, read)
