"""Request bodies for the tests of the wire formats: well-formed ones, and hostile ones."""

import json
from typing import Any

from hypothesis import strategies as st

from vllm_cachescope.prompt.request import Protocol

TTLS = (60, 300, 1800, 3600, 43200, 86400)

PATHS = {
    Protocol.MESSAGES: "/v1/messages",
    Protocol.CHAT: "/v1/chat/completions",
    Protocol.RESPONSES: "/v1/responses",
    Protocol.COMPLETIONS: "/v1/completions",
}

EPHEMERAL: dict[str, Any] = {"type": "ephemeral"}
MARK = {"cache_control": EPHEMERAL}

# Every word that some reader looks for, so that random JSON gets past the first check.
_KEY_WORDS = """
type text content source output input role name tools system messages instructions prompt
documents function tool_calls tool_choice thinking metadata user_id session_id cache_control
prompt_cache_breakpoint prompt_cache_key prompt_cache_options prompt_cache_retention mode ttl
scope diagnostics previous_message_id comparison_response_id previous_response_id model max_tokens
"""
_VALUE_WORDS = """
ephemeral 5m 1h 30m 0m 1h5m global org session explicit implicit 24h in_memory text thinking
tool_result input_text reasoning message user assistant system developer tool
"""

_KEYS = st.sampled_from(_KEY_WORDS.split()) | st.text(max_size=3)
_VALUES = st.sampled_from(_VALUE_WORDS.split())

_LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | _VALUES
    | st.text(st.characters(), max_size=5)
    | st.just("\ud800")
)

hostile_json = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(_KEYS, inner, max_size=6),
    max_leaves=40,
)

markers = st.fixed_dictionaries(
    {"type": st.just("ephemeral") | _LEAVES},
    optional={"ttl": _VALUES | _LEAVES, "scope": _VALUES | _LEAVES, "more": _LEAVES},
)

hostile_bodies = st.dictionaries(_KEYS, hostile_json | markers, max_size=8)

_text = st.text("ab ", min_size=1, max_size=6)
_mark = st.none() | st.just(EPHEMERAL)


def _block(kind: str = "text") -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {"type": st.just(kind), "text": _text}, optional={"cache_control": _mark}
    )


_tool_result = st.fixed_dictionaries(
    {
        "type": st.just("tool_result"),
        "tool_use_id": _text,
        "content": _text | st.lists(_block(), max_size=2),
    },
    optional={"cache_control": _mark},
)

_message = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "system"]),
        "content": _text | st.lists(_block() | _tool_result, max_size=3),
    }
)

messages_bodies = st.fixed_dictionaries(
    {"model": st.just("m"), "messages": st.lists(_message, max_size=4)},
    optional={
        "tools": st.lists(
            st.fixed_dictionaries(
                {"name": _text, "input_schema": st.just({"type": "object"})},
                optional={"cache_control": _mark},
            ),
            max_size=3,
        ),
        "system": _text | st.lists(_block(), max_size=3),
        "tool_choice": st.just({"type": "tool", "name": "a"}),
    },
)

_tool_call = st.fixed_dictionaries(
    {"id": _text, "function": st.just({"name": "a", "arguments": "{}"})},
    optional={"cache_control": _mark},
)

_chat_message = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool"])},
    optional={
        "content": st.none() | _text | st.lists(_block(), max_size=3),
        "name": _text,
        "tool_calls": st.lists(_tool_call, min_size=1, max_size=3),
    },
)

_chat_tools = st.lists(
    st.fixed_dictionaries(
        {"type": st.just("function"), "function": st.fixed_dictionaries({"name": _text})},
        optional={"cache_control": _mark},
    ),
    max_size=3,
)

chat_bodies = st.fixed_dictionaries(
    {"model": st.just("m"), "messages": st.lists(_chat_message, max_size=5)},
    optional={
        "tools": _chat_tools,
        "documents": st.just([{"text": "d"}]),
        "tool_choice": st.just({"type": "function", "function": {"name": "a"}}),
        "continue_final_message": st.booleans(),
    },
)

_item = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "developer", "user", "assistant"]),
        "content": _text | st.lists(_block("input_text"), max_size=3),
    }
) | st.fixed_dictionaries(
    {
        "type": st.just("function_call_output"),
        "call_id": _text,
        "output": _text | st.lists(_block("input_text"), max_size=2),
    },
    optional={"cache_control": _mark},
)

responses_bodies = st.fixed_dictionaries(
    {"model": st.just("m"), "input": _text | st.lists(_item, max_size=5)},
    optional={
        "tools": _chat_tools,
        "instructions": _text,
        "previous_response_id": _text,
    },
)

bodies: dict[Protocol, st.SearchStrategy[dict[str, Any]]] = {
    Protocol.MESSAGES: messages_bodies,
    Protocol.CHAT: chat_bodies,
    Protocol.RESPONSES: responses_bodies,
}


@st.composite
def broken_bodies(draw: st.DrawFn) -> tuple[Protocol, dict[str, Any]]:
    """A well-formed body in which one value, anywhere, is replaced."""
    protocol = draw(st.sampled_from(list(bodies)))
    body = json.loads(json.dumps(draw(bodies[protocol])))
    here: Any = body
    while True:
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        key = draw(st.sampled_from(keys))
        if not isinstance(here[key], dict | list) or not here[key] or draw(st.booleans()):
            break
        here = here[key]
    here[key] = draw(hostile_json | markers)
    if isinstance(here, dict) and draw(st.booleans()):
        here["cache_control"] = draw(markers)
    return protocol, body


def marked(**marks: Any) -> dict[str, Any]:
    """A Messages body with ``marks`` wherever one may stand."""
    block = {"type": "text", "text": "x", **marks}
    document = {"type": "document", "source": {"type": "content", "content": [block]}, **marks}
    result = {"type": "tool_result", "tool_use_id": "t", "content": [block, document], **marks}
    use = {"type": "tool_use", "id": "t", "name": "a", "input": {"cache_control": 1}, **marks}
    return {
        "model": "m",
        "max_tokens": 1,
        "tools": [{"name": "a", "input_schema": {"properties": {"cache_control": {}}}, **marks}],
        "system": [block],
        "messages": [
            {"role": "assistant", "content": [use]},
            {"role": "user", "content": [result, block]},
        ],
        "diagnostics": {"previous_message_id": None},
    }
