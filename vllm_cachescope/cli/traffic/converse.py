"""Reads the body of Bedrock's ``Converse``: its tools, its system prompt and its cache points."""

import re
from collections.abc import Mapping
from typing import Any

from vllm_cachescope.durations import parse_duration
from vllm_cachescope.prompt.request import Mark, Part, PromptRequest, Protocol, Region

_PATH = re.compile(
    r"/model/([^/?]+)/(?:converse|invoke)(?:-stream|-with-response-stream)?(?:\?|\Z)"
)

# What Converse calls a block, and what the parts of a request call it.
_CALLS = (("toolUse", "tool_use", "toolUseId", "id"), ("toolResult", "tool_result", "toolUseId",
          "tool_use_id"))  # fmt: skip


def is_path(path: str) -> bool:
    """Whether a path or URL is one at which Bedrock takes prompts."""
    return _PATH.search(path) is not None


def is_body(body: Mapping[str, Any]) -> bool:
    """Whether a body is one of Converse rather than one of the formats that vLLM serves."""
    if "toolConfig" in body or "inferenceConfig" in body or "additionalModelRequestFields" in body:
        return True
    blocks = list(_blocks(body.get("system")))
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, Mapping):
            blocks += _blocks(message.get("content"))
    return bool(blocks) and not any("type" in block for block in blocks)


def _blocks(content: object) -> list[Mapping[str, Any]]:
    """Return the blocks of a content, if it is a list of them."""
    if not isinstance(content, list):
        return []
    return [block for block in content if isinstance(block, Mapping)]


def read(body: Mapping[str, Any], path: str | None = None) -> PromptRequest:
    """Return the request in a body of Converse.

    A ``cachePoint`` ends the part before it, wherever it stands: among the tools, in the system
    prompt, in a message. Paths are those in the body: ``toolConfig.tools[2]``.

    Args:
        body: the body.
        path: the path or URL that it was sent to, which may name the model.
    """
    parts: list[Part] = []
    config = body.get("toolConfig")
    config = config if isinstance(config, Mapping) else {}
    _collect(parts, Region.TOOLS, "toolConfig.tools", config.get("tools"), None)
    _collect(parts, Region.SYSTEM, "system", body.get("system"), None)
    messages = body.get("messages")
    for i, message in enumerate(messages if isinstance(messages, list) else ()):
        if isinstance(message, Mapping):
            role = message.get("role")
            role = role if isinstance(role, str) else None
            at = f"messages[{i}].content"
            _collect(parts, Region.MESSAGES, at, message.get("content"), role)
    more = body.get("additionalModelRequestFields")
    params = dict(more) if isinstance(more, Mapping) else {}
    if (choice := config.get("toolChoice")) is not None:
        params["toolChoice"] = choice
    named = _PATH.search(path) if path else None
    model = body.get("modelId")
    metadata = body.get("requestMetadata")
    session = metadata.get("session_id") if isinstance(metadata, Mapping) else None
    return PromptRequest(
        Protocol.MESSAGES,
        model if isinstance(model, str) else named[1] if named else "",
        tuple(parts),
        automatic=all(part.mark is None for part in parts),
        session=session if isinstance(session, str) else None,
        params=params,
    )


def _collect(
    parts: list[Part], region: Region, path: str, content: object, role: str | None
) -> None:
    for i, block in enumerate(content if isinstance(content, list) else ()):
        at = f"{path}[{i}]"
        point = block.get("cachePoint") if isinstance(block, Mapping) else None
        if point is None:
            parts.append(Part(region, at, _respelled(block, region), role))
        elif parts:
            last = parts[-1]
            mark = Mark(f"{at}.cachePoint", _ttl(point))
            parts[-1] = Part(last.region, last.path, last.content, last.role, mark)


def _ttl(point: object) -> int | None:
    ttl = point.get("ttl") if isinstance(point, Mapping) else None
    try:
        return parse_duration(ttl) if isinstance(ttl, str) else None
    except ValueError:
        return None


def _respelled(block: Any, region: Region) -> Any:
    """Return a block as Messages spells it, so that both are compared and counted alike."""
    if not isinstance(block, Mapping):
        return block
    if region is Region.TOOLS and isinstance(spec := block.get("toolSpec"), Mapping):
        schema = spec.get("inputSchema")
        inner = schema.get("json", schema) if isinstance(schema, Mapping) else schema
        return {("input_schema" if k == "inputSchema" else k): inner if k == "inputSchema" else v
                for k, v in spec.items()}  # fmt: skip
    if set(block) == {"text"}:
        return {"type": "text", "text": block["text"]}
    for key, kind, theirs, ours in _CALLS:
        if isinstance(call := block.get(key), Mapping):
            fields = {ours if name == theirs else name: value for name, value in call.items()}
            if isinstance(inner := fields.get("content"), list):
                fields["content"] = [_respelled(one, Region.MESSAGES) for one in inner]
            return {"type": kind, **fields}
    return dict(block)
