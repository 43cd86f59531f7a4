"""The blocks of a request's body on which cache markers may stand, and the body without markers.

All formats nest blocks in the same way: a tool result, a document or a function's output holds a
list of further blocks, a Chat message a list of tool calls, a Chat tool or tool call its
``function``. Markers are looked for there and nowhere else: in a tool's schema or a tool call's
arguments a field called ``cache_control`` is the client's own data.
"""

from collections.abc import Iterator, Mapping
from typing import Any

CACHE_CONTROL = "cache_control"
BREAKPOINT = "prompt_cache_breakpoint"
MARKERS = (CACHE_CONTROL, BREAKPOINT)

# The deepest nesting in the `anthropic` package's types: tool_result.content[k].source.content[n].
_DEPTH = 2
_LISTS = ("content", "output", "tool_calls")
_FUNCTION = "function"  # of a Chat tool or tool call

# The fields of a body whose items carry markers, with how deep to look into an item: a message
# holds its blocks one level down.
_FIELDS = {"tools": 0, "system": _DEPTH, "messages": _DEPTH + 1, "input": _DEPTH + 1}

# Fields of the whole request, and the lifetimes in them that OpenAI has.
_OPTIONS = "prompt_cache_options"
_OPTIONS_TTL = "30m"
_RETENTION = "prompt_cache_retention"
_RETENTIONS = (None, "in_memory", "in-memory", "24h")


def blocks_within(value: object, path: str, depth: int = _DEPTH) -> Iterator[tuple[str, Any]]:
    """Yield each object inside ``value`` that a marker may stand on, with its path.

    Inner blocks come before the block that holds them, as their breakpoints do; ``value`` itself
    comes last. Anything that is not an object is skipped.
    """
    if not isinstance(value, Mapping):
        return
    if depth:
        for inner_path, inner in _lists(value, path):
            for i, block in enumerate(inner):
                yield from blocks_within(block, f"{inner_path}[{i}]", depth - 1)
    if isinstance(value.get(_FUNCTION), Mapping):
        yield f"{path}.{_FUNCTION}", value[_FUNCTION]
    yield path, value


def without_marks(value: Any, depth: int = _DEPTH) -> Any:
    """Return ``value`` without the markers on it and on the blocks inside it.

    Copies only what changes: a value without markers is returned as the same object.
    """
    if not isinstance(value, Mapping):
        return value
    changed: dict[str, Any] = {}
    if depth:
        for key in _LISTS:
            if (blocks := _each_without(value.get(key), depth - 1)) is not value.get(key):
                changed[key] = blocks
        source = value.get("source")
        if isinstance(source, Mapping):
            blocks = _each_without(source.get("content"), depth - 1)
            if blocks is not source.get("content"):
                changed["source"] = {**source, "content": blocks}
    function = value.get(_FUNCTION)
    if isinstance(function, Mapping) and any(key in function for key in MARKERS):
        changed[_FUNCTION] = _bare(function)
    if not changed and not any(key in value for key in MARKERS):
        return value
    return _bare({**value, **changed})


def strip(body: dict[str, Any]) -> dict[str, Any]:
    """Return ``body`` as it goes on to vLLM: without the markers on its tools, messages and blocks.

    vLLM's request models ignore some of the keys that they do not know, and keep others. A marker
    that is kept can end up in the prompt: on a Responses tool, or inside a tool result that is
    rendered as text. The fields at the top level (``prompt_cache_key``, ``diagnostics`` and the
    like) reach no prompt and stay, but for the lifetimes that are known here alone: vLLM 0.33
    refuses those that OpenAI does not have. Copies only what changes: a body without any of this
    is returned as the same object.
    """
    changed: dict[str, Any] = {}
    for name, depth in _FIELDS.items():
        bare = _each_without(body.get(name), depth)
        if bare is not body.get(name):
            changed[name] = bare
    options = body.get(_OPTIONS)
    if isinstance(options, Mapping) and "ttl" in options and options["ttl"] != _OPTIONS_TTL:
        changed[_OPTIONS] = {key: value for key, value in options.items() if key != "ttl"}
    forwarded = {**body, **changed} if changed else body
    if _RETENTION in body and body[_RETENTION] not in _RETENTIONS:
        return {key: value for key, value in forwarded.items() if key != _RETENTION}
    return forwarded


def _bare(value: Mapping[str, Any]) -> dict[str, Any]:
    return {key: item for key, item in value.items() if key not in MARKERS}


def _lists(value: Mapping[str, Any], path: str) -> Iterator[tuple[str, list[Any]]]:
    for key in _LISTS:
        if isinstance(value.get(key), list):
            yield f"{path}.{key}", value[key]
    source = value.get("source")
    if isinstance(source, Mapping) and isinstance(source.get("content"), list):
        yield f"{path}.source.content", source["content"]


def _each_without(blocks: Any, depth: int) -> Any:
    if not isinstance(blocks, list):
        return blocks
    bare = [without_marks(block, depth) for block in blocks]
    return bare if any(new is not old for new, old in zip(bare, blocks, strict=True)) else blocks
