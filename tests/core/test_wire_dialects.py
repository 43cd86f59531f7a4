"""Markers where clients of other dialects put them, and what is ignored instead of refused."""

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from tests.core.wire_bodies import (
    EPHEMERAL,
    MARK,
    TTLS,
    bodies,
    hostile_bodies,
    hostile_json,
    markers,
)
from tests.examples import examples
from vllm_cachescope.api.ignored_markers import IgnoredMarkers
from vllm_cachescope.config import load
from vllm_cachescope.errors import BadRequest
from vllm_cachescope.prompt.ignored_marker import IgnoredReason
from vllm_cachescope.prompt.request import PromptRequest, Protocol, Region
from vllm_cachescope.prompt.segments import RegionDefault, segments
from vllm_cachescope.tenancy.scope import Scope
from vllm_cachescope.wire import READERS, strip
from vllm_cachescope.wire.anthropic import read as read_messages
from vllm_cachescope.wire.openai_chat import read as read_chat
from vllm_cachescope.wire.openai_responses import read as read_responses
from vllm_cachescope.wire.truncate import truncate

EXPLICIT = {"mode": "explicit"}
POINT = {"prompt_cache_breakpoint": EXPLICIT}
HOUR = {"cache_control": {**EPHEMERAL, "ttl": "1h"}}
OPENAI = [Protocol.CHAT, Protocol.RESPONSES, Protocol.COMPLETIONS]
DEFAULTS = {region: RegionDefault(Scope.ORG, 300) for region in Region}


def text(words: str = "words", **marker: Any) -> dict[str, Any]:
    return {"type": "text", "text": words, **marker}


def scoped(scope: object) -> dict[str, Any]:
    return {"cache_control": {**EPHEMERAL, "scope": scope}}


def call(name: str, **marker: Any) -> dict[str, Any]:
    return {"id": name, "type": "function", "function": {"name": name, "arguments": "{}"}, **marker}


def user(*blocks: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks), **fields}


def tool_message(content: Any, **marker: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": "a", "content": content, **marker}


def chat(*messages: Any, **fields: Any) -> PromptRequest:
    return read_chat({"model": "m", "messages": list(messages), **fields}, TTLS)


def marks(request: PromptRequest) -> list[tuple[str, str]]:
    return [(part.path, part.mark.path) for part in request.parts if part.mark]


def ignored(request: PromptRequest) -> list[tuple[str, str]]:
    return [(marker.path, marker.reason.value) for marker in request.ignored]


def scopes(request: PromptRequest) -> list[Scope]:
    return [segment.scope for segment in segments(request, DEFAULTS)]


@pytest.mark.parametrize("marker", [MARK, POINT])
class TestPlaces:
    """Each holds for both kinds of marker."""

    def check(self, marker: dict[str, Any], message: dict[str, Any], part: str, at: str) -> None:
        request = chat(message)
        assert marks(request) == [(f"messages[0].{part}", f"messages[0]{at}.{next(iter(marker))}")]
        assert ignored(request) == []

    def test_a_message_with_content_parts(self, marker: dict[str, Any]) -> None:
        self.check(marker, user(text("a"), text("b"), **marker), "content[1]", "")

    def test_a_message_whose_last_content_part_is_empty(self, marker: dict[str, Any]) -> None:
        self.check(marker, user(text("a"), text(""), **marker), "content[1]", "")

    def test_a_message_with_a_string(self, marker: dict[str, Any]) -> None:
        self.check(marker, {"role": "user", "content": "x", **marker}, "content", "")

    @pytest.mark.parametrize("content", [None, "", [], "Looking.", [text("Looking.")]])
    def test_a_message_with_tool_calls(self, marker: dict[str, Any], content: Any) -> None:
        message = {"role": "assistant", "content": content, "tool_calls": [call("a"), call("b")]}
        self.check(marker, {**message, **marker}, "tool_calls[1]", "")

    @pytest.mark.parametrize(("nth", "part"), [(0, "tool_calls"), (1, "tool_calls[1]")])
    @pytest.mark.parametrize("inside", [False, True])
    def test_a_tool_call(self, marker: dict[str, Any], nth: int, part: str, inside: bool) -> None:
        calls = [call("a"), call("b"), call("c")]
        (calls[nth]["function"] if inside else calls[nth]).update(marker)
        at = f".tool_calls[{nth}]" + (".function" if inside else "")
        message = {"role": "assistant", "content": None, "tool_calls": calls}
        self.check(marker, message, part, at)
        body = strip({"messages": [message, user(text())]})
        assert body["messages"][0]["tool_calls"] == [call("a"), call("b"), call("c")]
        cut = truncate(body, Protocol.CHAT, chat(message).parts[nth + 1])
        assert [c["id"] for c in cut["messages"][0]["tool_calls"]] == list("abc")[: nth + 1]

    @pytest.mark.parametrize("content", ["", [], None, [text("")], "3 files", [text("3 files")]])
    def test_the_result_of_a_tool(self, marker: dict[str, Any], content: Any) -> None:
        block = "content[0]" if content and isinstance(content, list) else "content"
        self.check(marker, tool_message(content, **marker), block, "")

    def test_an_empty_block_of_the_result_of_a_tool(self, marker: dict[str, Any]) -> None:
        self.check(marker, tool_message([text("", **marker)]), "content[0]", ".content[0]")

    @pytest.mark.parametrize("inside", [False, True])
    def test_a_tool(self, marker: dict[str, Any], inside: bool) -> None:
        function = {"name": "a", "parameters": {"properties": {"cache_control": {}}}}
        bare = {"type": "function", "function": function}
        tool = {**bare, "function": {**function, **marker}} if inside else {**bare, **marker}
        request = chat(user(text()), tools=[tool])
        at = "tools[0].function" if inside else "tools[0]"
        assert marks(request) == [("tools[0]", f"{at}.{next(iter(marker))}")]
        assert request.parts[0].content == bare
        assert strip({"tools": [tool]}) == {"tools": [bare]}

    def test_a_responses_message_with_content_parts(self, marker: dict[str, Any]) -> None:
        request = read_responses({"input": [user(text(), text(), **marker)]}, TTLS)
        assert [path for path, _ in marks(request)] == ["input[0].content[1]"]

    @pytest.mark.parametrize("output", ["", [], "x", [text("")]])
    def test_a_responses_item(self, marker: dict[str, Any], output: Any) -> None:
        item = {"type": "function_call_output", "call_id": "c", "output": output, **marker}
        request = read_responses({"input": [item]}, TTLS)
        assert [path for path, _ in marks(request)] == ["input[0]"]

    @pytest.mark.parametrize(
        "message",
        [
            lambda marker: user(text("", **marker)),
            lambda marker: user(text(""), **marker),
            lambda marker: {"role": "user", "content": "", **marker},
            lambda marker: {"role": "assistant", "content": None, **marker},
            lambda marker: {"role": "user", "name": "kim", "content": [], **marker},
        ],
    )
    def test_what_is_empty_is_ignored(self, marker: dict[str, Any], message: Any) -> None:
        request = chat(message(marker), user(text()))
        assert marks(request) == []
        assert request.automatic
        assert [reason for _, reason in ignored(request)] == ["empty"]

    def test_no_marker_on_a_thinking_block_or_a_choice(self, marker: dict[str, Any]) -> None:
        thinking = {"type": "thinking", "thinking": "x", **marker}
        choice = {"type": "auto", **marker}
        request = chat({"role": "assistant", "content": [thinking]}, tool_choice=choice)
        key = next(iter(marker))
        assert ignored(request) == [
            (f"messages[0].content[0].{key}", "misplaced"),
            (f"tool_choice.{key}", "misplaced"),
        ]


class TestLimits:
    @pytest.mark.parametrize("kind", [MARK, POINT])
    def test_of_more_than_four_the_last_four_count(self, kind: dict[str, Any]) -> None:
        options = {"prompt_cache_options": {"mode": "explicit"}}
        request = chat(user(*[text(**kind)] * 6), **options)
        assert [i for i, part in enumerate(request.parts) if part.mark] == [2, 3, 4, 5]
        key = next(iter(kind))
        at = [f"messages[0].content[{i}].{key}" for i in (0, 1)]
        assert ignored(request) == [(path, "too_many") for path in at]

    def test_the_top_level_is_one_of_the_four(self) -> None:
        request = chat(user(*[text(**MARK)] * 4, text()), cache_control=EPHEMERAL)
        assert [i for i, part in enumerate(request.parts) if part.mark] == [1, 2, 3, 4]

    def test_what_does_not_count_still_narrows(self) -> None:
        blocks = [text(**scoped("session")), *[text(**MARK)] * 4]
        request = chat({"role": "system", "content": "s"}, user(*blocks))
        assert scopes(request)[-1] is Scope.SESSION
        tools = [{"function": {"name": "a"}, **scoped("session")}]
        assert set(scopes(chat(user(*[text(**MARK)] * 4), tools=tools))) == {Scope.SESSION}

    def test_a_longer_lifetime_is_cut(self) -> None:
        request = chat(user(text(**MARK), text(**HOUR)))
        assert [part.mark.ttl_s for part in request.parts if part.mark] == [None, 300]
        assert ignored(request) == [("messages[0].content[1].cache_control.ttl", "longer_ttl")]

    def test_a_lifetime_beside_the_automatic_one(self) -> None:
        for block, top in ((MARK, HOUR), (HOUR, MARK)):
            request = chat(user(text(**block)), **top)
            assert request.parts[0].mark and request.parts[0].mark.ttl_s == 300
            assert ignored(request) == [("cache_control.ttl", "longer_ttl")]

    def test_a_wider_scope_is_cut(self) -> None:
        request = chat(user(text(**scoped("session")), text(**scoped("global"))))
        assert [p.mark.scope for p in request.parts if p.mark] == [Scope.SESSION, Scope.SESSION]
        assert ignored(request) == [("messages[0].content[1].cache_control.scope", "wider_scope")]


@pytest.mark.parametrize(
    ("value", "reason", "field"),
    [
        ("yes", "malformed", ""),
        (True, "malformed", ""),
        ([EPHEMERAL], "malformed", ""),
        ({}, "malformed", ".type"),
        ({"type": "persistent"}, "malformed", ".type"),
        ({**EPHEMERAL, "ttl": "7h"}, "unknown_ttl", ".ttl"),
        ({**EPHEMERAL, "ttl": 300}, "unknown_ttl", ".ttl"),
        ({**EPHEMERAL, "tll": "5m"}, "unknown_field", ".tll"),
        ({**EPHEMERAL, "scope": "planet"}, "unknown_scope", ".scope"),
        ({**EPHEMERAL, "scope": ["org"]}, "unknown_scope", ".scope"),
    ],
)
def test_a_wrong_value(value: object, reason: str, field: str) -> None:
    for blocks, top, path in (
        ([text(cache_control=value)], {}, "messages[0].content[0].cache_control"),
        ([text()], {"cache_control": value}, "cache_control"),
    ):
        request = chat(user(*blocks), **top)
        assert ignored(request) == [(path + field, reason)]
        # A marker whose type is known ends its part, with what is known of it.
        assert bool(marks(request)) is (reason != "malformed")
        assert request.automatic is (reason == "malformed")
        narrowest = Scope.SESSION if reason == "unknown_scope" else Scope.ORG
        assert scopes(request)[0] is narrowest


@pytest.mark.parametrize(
    "value", [{"type": "x", "scope": "session"}, {"scope": "session"}, {"type": 1, "scope": 7}]
)
@pytest.mark.parametrize("place", ["block", "empty", "top", "choice", "breakpoint"])
def test_an_ignored_marker_never_widens(value: dict[str, Any], place: str) -> None:
    blocks: list[Any] = [text()]
    fields: dict[str, Any] = {}
    if place in ("block", "empty"):
        blocks.insert(0, text("x" if place == "block" else "", cache_control=value))
    elif place == "breakpoint":
        blocks[0]["prompt_cache_breakpoint"] = {**EXPLICIT, **value}
    else:
        fields["cache_control" if place == "top" else "tool_choice"] = (
            value if place == "top" else {"cache_control": value}
        )
    request = chat(user(*blocks), **fields)
    assert ignored(request)
    assert scopes(request)[-1] is Scope.SESSION


class TestTwoDialects:
    """The narrower reading: nothing after the last marker, the shorter of two lifetimes."""

    def test_no_implicit_breakpoint(self) -> None:
        request = chat(user(text(**MARK), text(**POINT), text()))
        assert not request.automatic
        assert len(marks(request)) == 2
        assert ignored(request) == [
            ("messages[0].content[1].prompt_cache_breakpoint", "two_dialects")
        ]
        implicit = {"prompt_cache_options": {"mode": "implicit"}}
        assert not chat(user(text(**MARK), text(**POINT)), **implicit).automatic

    @pytest.mark.parametrize(("hour", "short"), [(HOUR, POINT), (MARK, {})])
    def test_one_part_with_both(self, hour: dict[str, Any], short: dict[str, Any]) -> None:
        point = short or {"prompt_cache_breakpoint": {**EXPLICIT, "ttl": "1h"}}
        (part,) = chat(user(text(**hour, **point))).parts
        assert part.mark and part.mark.ttl_s in (None, 300)

    def test_at_most_four_together(self) -> None:
        request = chat(user(*[text(**MARK), text(**POINT)] * 3))
        assert [i for i, part in enumerate(request.parts) if part.mark] == [2, 3, 4, 5]


@pytest.mark.parametrize("protocol", OPENAI)
@pytest.mark.parametrize(
    "fields",
    [
        {"prompt_cache_key": 7},
        {"prompt_cache_retention": "forever"},
        {"prompt_cache_options": "explicit"},
        {"prompt_cache_options": {"mode": "auto"}},
        {"prompt_cache_options": {"ttl": "7h"}},
        {"prompt_cache_options": {"more": 1}},
        {"prompt_cache_options": {"comparison_response_id": 1}},
    ],
)
def test_a_wrong_option_is_ignored(protocol: Protocol, fields: dict[str, Any]) -> None:
    prompt = {"messages": [user(text())], "input": "x", "prompt": "x"}
    request = READERS[protocol]({**prompt, **fields}, TTLS)
    assert (request.automatic, request.ttl_s, request.session) == (True, None, None)
    assert len(request.ignored) == 1


@pytest.mark.parametrize(
    ("sent", "forwarded"),
    [
        ({"ttl": "12h", "mode": "explicit"}, {"mode": "explicit"}),
        ({"ttl": "30m", "prewarm": True}, {"ttl": "30m", "prewarm": True}),
        ({"ttl": None}, {}),
        ({}, {}),
        ("x", "x"),
    ],
)
def test_vllm_gets_no_lifetime_that_it_refuses(sent: Any, forwarded: Any) -> None:
    """vLLM 0.33's Responses endpoint knows 30m alone."""
    assert strip({"input": "x", "prompt_cache_options": sent}) == {
        "input": "x",
        "prompt_cache_options": forwarded,
    }


@pytest.mark.parametrize(
    ("retention", "kept"),
    [("24h", True), ("in_memory", True), ("in-memory", True), ("1h", False), ([], False)],
)
def test_vllm_gets_no_retention_that_it_refuses(retention: object, kept: bool) -> None:
    body = {"input": "x", "prompt_cache_retention": retention}
    assert strip(body) == (body if kept else {"input": "x"})


class TestMessages:
    """What Anthropic's API refuses, unless the operator is lenient."""

    @pytest.mark.parametrize("words", ["", " ", "\n"])
    def test_an_empty_text(self, words: str) -> None:
        body = {"messages": [user(text(words, **MARK))]}
        with pytest.raises(BadRequest) as refused:
            read_messages(body, TTLS)
        assert refused.value.path == "messages[0].content[0].cache_control"
        read_messages(body, TTLS, strict=False)

    @pytest.mark.parametrize("content", ["", [], None])
    def test_an_empty_result_of_a_tool(self, content: Any) -> None:
        result = {"type": "tool_result", "tool_use_id": "t", "content": content, **MARK}
        request = read_messages({"messages": [user(result)]}, TTLS)
        assert [path for path, _ in marks(request)] == ["messages[0].content[0]"]

    def test_lenient_on_a_message(self) -> None:
        body = {"messages": [user(text("a"), text("b"), **MARK)]}
        with pytest.raises(BadRequest):
            read_messages(body, TTLS)
        request = read_messages(body, TTLS, strict=False)
        assert [path for path, _ in marks(request)] == ["messages[0].content[1]"]

    def test_the_session_of_the_body(self) -> None:
        body = {"metadata": {"user_id": json.dumps({"session_id": "m"})}}
        assert read_messages({**body, "session_id": "s"}, TTLS).session == "s"
        for other in (7, "", "\ud800", None):
            assert read_messages({**body, "session_id": other}, TTLS).session == "m"


def test_the_operator_chooses() -> None:
    assert [p for p in Protocol if load({}).markers.is_strict(p)] == [Protocol.MESSAGES]
    chosen = load({"markers": {"openai": "strict", "anthropic": "lenient"}}).markers
    assert [p for p in Protocol if chosen.is_strict(p)] == OPENAI


def test_what_is_ignored_is_counted_by_reason() -> None:
    registry = CollectorRegistry()
    counter = IgnoredMarkers(registry, "m")
    counter.count(chat(user(*[text(**MARK)] * 6, text("", **MARK))), "0")
    counts = {
        reason: registry.get_sample_value(
            "cachescope_ignored_markers_total", {"model_name": "m", "engine": "0", "reason": reason}
        )
        for reason in IgnoredReason
    }
    assert counts == dict.fromkeys(IgnoredReason) | {"too_many": 2.0, "empty": 1.0}
    assert all(reason.words for reason in IgnoredReason)


@st.composite
def marked_anywhere(draw: st.DrawFn) -> tuple[Protocol, dict[str, Any]]:
    """A body that plain vLLM may serve, with markers of any kind on any of its objects."""
    protocol = draw(st.sampled_from(OPENAI))
    plain = bodies.get(protocol, st.just({"model": "m", "prompt": "x"}))
    body: dict[str, Any] = json.loads(json.dumps(draw(plain)))
    owners: list[dict[str, Any]] = []
    stack: list[Any] = [body]
    while stack:
        here = stack.pop()
        if isinstance(here, dict):
            owners.append(here)
        stack += here.values() if isinstance(here, dict) else here if isinstance(here, list) else ()
    for owner in draw(st.lists(st.sampled_from(owners), min_size=1, max_size=8)):
        key = draw(st.sampled_from(["cache_control", "prompt_cache_breakpoint"]))
        owner[key] = draw(markers | hostile_json | st.just(EXPLICIT) | st.just(EPHEMERAL))
    return protocol, body


@settings(max_examples=examples(800), deadline=None)
@given(marked_anywhere())
def test_no_marker_refuses_a_request(case: tuple[Protocol, dict[str, Any]]) -> None:
    protocol, body = case
    before = copy.deepcopy(body)
    request = READERS[protocol](body, TTLS)
    assert sum(part.mark is not None for part in request.parts) <= 4
    plan = segments(request, DEFAULTS)
    assert [segment.scope for segment in plan] == sorted(segment.scope for segment in plan)
    bare = READERS[protocol](strip(body), TTLS)
    assert [(p.path, p.content) for p in bare.parts] == [(p.path, p.content) for p in request.parts]
    assert not any(part.mark and part.mark.path != "cache_control" for part in bare.parts)
    assert repr(body) == repr(before)


@settings(max_examples=examples(300), deadline=None)
@given(st.sampled_from(OPENAI), hostile_bodies)
def test_no_value_of_a_cache_field_refuses_a_request(
    protocol: Protocol, body: dict[str, Any]
) -> None:
    READERS[protocol](body, TTLS)


_scope = st.sampled_from(["global", "org", "session", "planet", None])


@settings(max_examples=examples(300), deadline=None)
@given(st.lists(st.tuples(_scope, st.booleans(), st.booleans()), min_size=1, max_size=9))
def test_nothing_is_shared_wider_than_asked(asked: list[tuple[str | None, bool, bool]]) -> None:
    """Each marker may stand on an empty text or be of an unknown type, and there may be many."""
    blocks = [
        text(
            "" if empty else "x", cache_control={"type": "ephemeral" if known else "x", "scope": s}
        )
        for s, empty, known in asked
    ]
    request = chat(user(*blocks, text()))
    plan = segments(request, DEFAULTS)
    ends = [segment.after.path if segment.after else request.parts[-1].path for segment in plan]
    segment = 0
    for part, (scope, _, _) in zip(request.parts, asked, strict=False):
        if scope is not None:
            least = Scope.SESSION if scope == "planet" else Scope.parse(scope)
            assert plan[segment].scope >= least
        segment += part.path == ends[segment]
