"""`strip` and `truncate`: what of a body is left, and that nothing else changes."""

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.wire_bodies import EPHEMERAL, MARK, TTLS, bodies, marked
from vllm_cachescope.errors import BadRequest
from vllm_cachescope.prompt.request import Part, Protocol, Region
from vllm_cachescope.wire import READERS, strip
from vllm_cachescope.wire.truncate import truncate

POINT = {"prompt_cache_breakpoint": {"mode": "explicit"}}


@pytest.mark.parametrize("marks", [MARK, POINT, {"cache_control": None}])
def test_strip_takes_the_markers_and_nothing_else(marks: dict[str, Any]) -> None:
    body = marked(**marks)
    before = copy.deepcopy(body)
    assert strip(body) == marked()
    assert body == before


def test_strip_in_the_openai_formats() -> None:
    call = {"type": "function_call_output", "call_id": "c"}

    def items(**marks: Any) -> list[Any]:
        block = {"type": "input_text", "text": "x", **marks}
        return [
            {"role": "user", "content": [block], **marks},
            {**call, "output": [block], **marks},
            {"role": "tool", "content": "x", **marks},
        ]

    for name in ("messages", "input"):
        assert strip({name: items(**MARK, **POINT)}) == {name: items()}


def test_strip_leaves_a_body_without_markers_as_it_is() -> None:
    body = marked() | {"cache_control": EPHEMERAL, "prompt_cache_key": "k"}
    assert strip(body) is body


def test_strip_shares_what_it_does_not_change() -> None:
    body = marked(**MARK) | {"messages": [{"role": "user", "content": "x"}]}
    assert strip(body)["messages"] is body["messages"]


@given(st.data())
def test_strip_makes_the_contents_that_the_readers_report(data: st.DataObject) -> None:
    protocol = data.draw(st.sampled_from(list(bodies)))
    body = data.draw(bodies[protocol])
    try:
        parts = READERS[protocol](body, TTLS).parts
    except BadRequest:
        return
    bare = READERS[protocol](strip(body), TTLS).parts
    assert [(p.path, p.content) for p in bare] == [(p.path, p.content) for p in parts]
    assert not any(part.mark for part in bare)


@given(st.data())
def test_truncate_keeps_the_parts_up_to_the_one_named(data: st.DataObject) -> None:
    """Reading what is left gives those parts, and no others."""
    protocol = data.draw(st.sampled_from(list(bodies)))
    body = data.draw(bodies[protocol])
    read = READERS[protocol]
    parts = read(strip(body), TTLS).parts
    if not parts:
        return
    before = copy.deepcopy(body)
    end = data.draw(st.integers(0, len(parts) - 1))
    cut = truncate(strip(body), protocol, parts[end])
    assert read(cut, TTLS).parts == parts[: end + 1]
    assert body == before
    assert "cache_control" not in json.dumps(cut)


@pytest.mark.parametrize(
    ("path", "region", "left"),
    [
        ("tools[0]", Region.TOOLS, {"tools": [1], "messages": []}),
        ("system[0]", Region.SYSTEM, {"tools": [1, 2], "system": ["a"], "messages": []}),
        (
            "messages[0].content",
            Region.MESSAGES,
            {"tools": [1, 2], "system": ["a", "b"], "messages": [{"content": "x"}]},
        ),
    ],
)
def test_truncate_messages(path: str, region: Region, left: dict[str, Any]) -> None:
    body: dict[str, Any] = {
        "model": "m",
        "thinking": {"type": "adaptive"},
        "tools": [1, 2],
        "system": ["a", "b"],
        "messages": [{"content": "x"}, {"content": "y"}],
    }
    kept = {"model": "m", "thinking": {"type": "adaptive"}}
    assert truncate(strip(body), Protocol.MESSAGES, Part(region, path, None)) == kept | left


@pytest.mark.parametrize(
    ("choice", "kept"),
    [
        ({"type": "tool", "name": "b"}, False),
        ({"type": "tool", "name": "a"}, True),
        ({"type": "function", "function": {"name": "b"}}, False),
        ({"type": "auto"}, True),
        ("required", True),
        ({"name": [[]]}, True),
    ],
)
def test_truncate_drops_the_choice_of_a_tool_that_is_gone(choice: object, kept: bool) -> None:
    tools = [{"name": "a"}, {"function": {"name": "b"}}]
    body = {"tools": tools, "tool_choice": choice, "messages": []}
    cut = truncate(body, Protocol.CHAT, Part(Region.TOOLS, "tools[0]", None))
    assert ("tool_choice" in cut) is kept


def test_truncate_a_chat_message_before_its_tool_calls() -> None:
    message = {"role": "assistant", "name": "n", "content": "x", "tool_calls": [{}]}
    body = {"messages": [message, {}], "continue_final_message": True}

    def left(path: str) -> Any:
        return truncate(body, Protocol.CHAT, Part(Region.MESSAGES, path, None))

    assert left("messages[0].tool_calls") == {"messages": [message]}
    assert left("messages[0].content") == {
        "messages": [{"role": "assistant", "name": "n", "content": "x"}]
    }


def test_truncate_responses_at_the_system_region_forgets_earlier_turns() -> None:
    body = {"instructions": "i", "previous_response_id": "r", "input": "x"}
    cut = truncate(body, Protocol.RESPONSES, Part(Region.SYSTEM, "instructions", None))
    assert cut == {"instructions": "i", "input": []}


def test_truncate_chat_at_the_system_region_leaves_out_documents() -> None:
    system = {"role": "system", "content": "s"}
    body = {"documents": [{}], "messages": [system, {"role": "user", "content": "u"}]}

    def left(region: Region, path: str) -> Any:
        return truncate(body, Protocol.CHAT, Part(region, path, None))

    assert left(Region.SYSTEM, "messages[0].content") == {"messages": [system]}
    assert left(Region.MESSAGES, "documents") == {"documents": [{}], "messages": [system]}


def test_truncate_completions_has_nothing_to_cut() -> None:
    body = {"prompt": "x"}
    assert truncate(body, Protocol.COMPLETIONS, Part(Region.MESSAGES, "prompt", "x")) == body
