import json
from typing import Any

import pytest
from anthropic.types.message_create_params import MessageCreateParamsNonStreaming
from pydantic import TypeAdapter

from tests.core.wire_bodies import EPHEMERAL, TTLS
from vllm_cachescope.errors import BadRequest
from vllm_cachescope.prompt.request import Mark, Part, PromptRequest, Protocol, Region
from vllm_cachescope.tenancy.scope import Scope
from vllm_cachescope.wire.anthropic import read
from vllm_cachescope.wire.billing_header import is_dropped

HOUR = {"type": "ephemeral", "ttl": "1h"}
SESSION = "0f4c2d9e-5a17-4b7e-9a55-3f8f2f1b6c01"


def scoped(scope: str) -> dict[str, str]:
    return {**EPHEMERAL, "scope": scope}


def text(words: str = "words", mark: Any = None) -> dict[str, Any]:
    block = {"type": "text", "text": words}
    return block if mark is None else {**block, "cache_control": mark}


def tool(name: str, mark: Any = None) -> dict[str, Any]:
    plain = {"name": name, "input_schema": {"type": "object"}}
    return plain if mark is None else {**plain, "cache_control": mark}


def body(**fields: Any) -> dict[str, Any]:
    user = {"role": "user", "content": "hello"}
    return {"model": "m", "max_tokens": 8, "messages": [user], **fields}


def user(*blocks: Any, **fields: Any) -> dict[str, Any]:
    return body(messages=[{"role": "user", "content": list(blocks)}], **fields)


def marks(request: PromptRequest) -> list[tuple[str, str]]:
    return [(part.path, part.mark.path) for part in request.parts if part.mark]


FULL = body(
    tools=[tool("a"), tool("b", HOUR)],
    system=[text("one"), text("two", {**HOUR, "scope": "global"})],
    messages=[
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": [text("hm"), {"type": "thinking", "thinking": "x"}]},
        {"role": "system", "content": "mind the time"},
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "t",
                    "content": [text("r", scoped("org")), text("s")],
                },
                text("go", {**EPHEMERAL, "ttl": "5m", "scope": "session"}),
            ],
        },
    ],
    tool_choice={"type": "auto"},
    metadata={"user_id": json.dumps({"session_id": SESSION, "device_id": "d"})},
    diagnostics={"previous_message_id": "msg_1"},
)


def test_every_kind_of_part_and_mark() -> None:
    request = read(FULL, TTLS)
    result = {"type": "tool_result", "tool_use_id": "t", "content": [text("r"), text("s")]}
    tools, system, messages = Region.TOOLS, Region.SYSTEM, Region.MESSAGES
    nested = Mark("messages[3].content[0].content[0].cache_control", None, Scope.ORG)
    assert request.parts == (
        Part(tools, "tools[0]", tool("a")),
        Part(tools, "tools[1]", tool("b"), mark=Mark("tools[1].cache_control", 3600)),
        Part(system, "system[0]", text("one")),
        Part(
            system,
            "system[1]",
            text("two"),
            mark=Mark("system[1].cache_control", 3600, Scope.GLOBAL),
        ),
        Part(messages, "messages[0].content", "hello", "user"),
        Part(messages, "messages[1].content[0]", text("hm"), "assistant"),
        Part(
            messages, "messages[1].content[1]", {"type": "thinking", "thinking": "x"}, "assistant"
        ),
        Part(messages, "messages[2].content", "mind the time", "system"),
        Part(messages, "messages[3].content[0]", result, "user", nested),
        Part(
            messages,
            "messages[3].content[1]",
            text("go"),
            "user",
            Mark("messages[3].content[1].cache_control", 300, Scope.SESSION),
        ),
    )
    assert request.protocol is Protocol.MESSAGES
    assert (request.model, request.automatic, request.prewarm) == ("m", False, False)
    assert (request.session, request.diagnose, request.previous_id) == (SESSION, True, "msg_1")
    assert request.params == {"tool_choice": {"type": "auto"}}


def test_the_client_package_allows_marks_where_we_read_them() -> None:
    """Its types know no scope; leave that out and validate the rest, iterables and all."""
    plain = json.loads(json.dumps(FULL), object_hook=lambda o: {**o, "scope": None})
    plain = json.loads(
        json.dumps(plain), object_hook=lambda o: {k: v for k, v in o.items() if k != "scope"}
    )
    adapter = TypeAdapter(MessageCreateParamsNonStreaming)
    parsed: Any = adapter.validate_python(plain)
    assert list(parsed["tools"])[1]["cache_control"] == HOUR
    last = list(parsed["messages"])[3]
    result = next(iter(last["content"]))
    nested = next(iter(result["content"]))
    assert nested["cache_control"] == EPHEMERAL


@pytest.mark.parametrize(
    ("inner", "path"),
    [
        ({"type": "tool_result", "content": [text("x", EPHEMERAL)]}, ".content[0]"),
        (
            {"type": "document", "source": {"type": "content", "content": [text("x", EPHEMERAL)]}},
            ".source.content[0]",
        ),
        ({"type": "search_result", "content": [text("x", EPHEMERAL)]}, ".content[0]"),
        (
            {
                "type": "tool_result",
                "content": [
                    {
                        "type": "document",
                        "source": {"type": "content", "content": [text("x", EPHEMERAL)]},
                    }
                ],
            },
            ".content[0].source.content[0]",
        ),
    ],
)
def test_a_nested_mark_ends_the_enclosing_part(inner: dict[str, Any], path: str) -> None:
    request = read(user(inner, text()), TTLS)
    at = "messages[0].content[0]"
    assert marks(request) == [(at, f"{at}{path}.cache_control")]
    assert "cache_control" not in json.dumps(request.parts[0].content)


def test_several_marks_on_one_part_are_one_breakpoint() -> None:
    """It keeps the longest lifetime and the narrowest scope."""
    result = {
        "type": "tool_result",
        "content": [text("a", {**HOUR, "scope": "global"}), text("b", scoped("org"))],
        "cache_control": EPHEMERAL,
    }
    (part,) = read(user(result), TTLS).parts
    assert part.mark == Mark("messages[0].content[0].cache_control", 3600, Scope.ORG)


@pytest.mark.parametrize("null", [user(text("x")), user({**text("x"), "cache_control": None})])
def test_a_null_marker_is_none(null: dict[str, Any]) -> None:
    request = read({**null, "cache_control": None}, TTLS)
    assert request.automatic
    assert request.parts[0].content == text("x")


class TestAutomatic:
    def test_falls_on_the_last_part_that_can_carry_it(self) -> None:
        thinking = {"type": "thinking", "thinking": "x"}
        request = read(user(text("a"), text(""), thinking, cache_control=HOUR), TTLS)
        assert not request.automatic
        assert request.parts[0].mark == Mark("cache_control", 3600)
        assert marks(request) == [("messages[0].content[0]", "cache_control")]

    def test_falls_on_a_string(self) -> None:
        request = read(body(cache_control=scoped("session")), TTLS)
        assert request.parts[0].mark == Mark("cache_control", None, Scope.SESSION)

    def test_falls_on_a_tool_when_there_is_nothing_else(self) -> None:
        request = read(body(messages=[], tools=[tool("a")], cache_control=EPHEMERAL), TTLS)
        assert marks(request) == [("tools[0]", "cache_control")]

    def test_nothing_to_fall_on(self) -> None:
        request = read(body(messages=[], cache_control=EPHEMERAL), TTLS)
        assert (request.parts, request.automatic) == ((), False)

    def test_agrees_with_the_mark_already_there(self) -> None:
        five = {**EPHEMERAL, "ttl": "5m"}
        (part,) = read(user(text("x", five), cache_control=EPHEMERAL), TTLS).parts
        assert part.mark == Mark("cache_control", 300)

    def test_disagrees_with_the_mark_already_there(self) -> None:
        with pytest.raises(BadRequest) as refused:
            read(user(text("x", HOUR), cache_control=EPHEMERAL), TTLS)
        assert refused.value.path == "cache_control.ttl"

    def test_takes_one_of_the_four(self) -> None:
        three = [text("x", EPHEMERAL)] * 3
        assert len(marks(read(user(*three, text(), cache_control=EPHEMERAL), TTLS))) == 4
        with pytest.raises(BadRequest) as refused:
            read(user(*three, text("x", EPHEMERAL), text(), cache_control=EPHEMERAL), TTLS)
        assert refused.value.path == "cache_control"


LAST = "messages[0].content[0].cache_control"


@pytest.mark.parametrize(
    ("wrong", "path", "allowed"),
    [
        (user(text("x", "yes")), LAST, "an object with type, ttl, scope"),
        (user(text("x", {})), f"{LAST}.type", "one of ephemeral"),
        (user(text("x", {"type": "forever"})), f"{LAST}.type", "one of ephemeral"),
        (user(text("x", {"type": ["ephemeral"]})), f"{LAST}.type", "one of ephemeral"),
        (
            user(text("x", {**EPHEMERAL, "ttl": "2h"})),
            f"{LAST}.ttl",
            "one of 1m, 5m, 30m, 1h, 12h, 24h",
        ),
        (user(text("x", {**EPHEMERAL, "ttl": 300})), f"{LAST}.ttl", "one of 1m, 5m"),
        (user(text("x", {**EPHEMERAL, "ttl": "9" * 5000 + "m"})), f"{LAST}.ttl", "one of 1m"),
        (user(text("x", scoped("planet"))), f"{LAST}.scope", "one of global, org, session"),
        (user(text("x", {**EPHEMERAL, "scope": {}})), f"{LAST}.scope", "one of global"),
        (user(text("x", {**EPHEMERAL, "tll": "5m"})), f"{LAST}.tll", "one of type, ttl, scope"),
        (
            user(text("x", {**EPHEMERAL, "\ud800!" * 99: 1})),
            f"{LAST}.'" + r"\ud800!" * 20 + "'",
            "one of type, ttl, scope",
        ),
        (user(text("", EPHEMERAL)), LAST, "only on a text block with text"),
        (user({"type": "text", "cache_control": EPHEMERAL}), LAST, "only on a text block"),
        (
            user({"type": "thinking", "thinking": "x", "cache_control": EPHEMERAL}),
            LAST,
            "none on a thinking block",
        ),
        (
            user({"type": "redacted_thinking", "data": "x", "cache_control": EPHEMERAL}),
            LAST,
            "none on a thinking block",
        ),
        (
            body(messages=[{"role": "user", "content": "x", "cache_control": EPHEMERAL}]),
            "messages[0].cache_control",
            "only on tools and content blocks",
        ),
        (body(metadata={"cache_control": EPHEMERAL}), "metadata.cache_control", "only on tools"),
        (
            body(tool_choice={"type": "auto", "cache_control": EPHEMERAL}),
            "tool_choice.cache_control",
            "only on tools",
        ),
        (body(cache_control="on"), "cache_control", "an object"),
        (body(tools=[tool("a", {"type": 1})]), "tools[0].cache_control.type", "one of ephemeral"),
        (
            body(system=[text("x", {**EPHEMERAL, "ttl": "3h"})]),
            "system[0].cache_control.ttl",
            "one of",
        ),
        (user(*[text("x", EPHEMERAL)] * 5), "messages[0].content[4].cache_control", "at most 4"),
        (
            user(*[{"type": "tool_result", "content": [text("x", EPHEMERAL)] * 5}]),
            "messages[0].content[0].content[4].cache_control",
            "at most 4",
        ),
        (body(diagnostics=1), "diagnostics", "an object with previous_message_id"),
        (
            body(diagnostics={"previous_message_id": 1}),
            "diagnostics.previous_message_id",
            "a string",
        ),
        (body(diagnostics={"previous": "m"}), "diagnostics.previous", "previous_message_id"),
    ],
)
def test_refused(wrong: dict[str, Any], path: str, allowed: str) -> None:
    with pytest.raises(BadRequest) as refused:
        read(wrong, TTLS)
    assert refused.value.path == path
    assert allowed in refused.value.allowed
    assert path in str(refused.value)


@pytest.mark.parametrize(
    ("first", "second", "default_ttl_s", "ok"),
    [
        (HOUR, EPHEMERAL, 300, True),
        (EPHEMERAL, HOUR, 300, False),
        (EPHEMERAL, HOUR, 3600, True),
        (HOUR, EPHEMERAL, 86400, False),
        ({**EPHEMERAL, "ttl": "5m"}, {**EPHEMERAL, "ttl": "5m"}, 300, True),
        ({**EPHEMERAL, "ttl": "1m"}, EPHEMERAL, 300, False),
    ],
)
def test_longer_lifetimes_come_first(first: Any, second: Any, default_ttl_s: int, ok: bool) -> None:
    """In prompt order, whatever the order of the body's fields."""
    given: dict[str, Any] = {"messages": [{"role": "user", "content": [text("x", second)]}]}
    given |= {"model": "m", "tools": [tool("a", first)]}
    if ok:
        assert len(marks(read(given, TTLS, default_ttl_s))) == 2
        return
    with pytest.raises(BadRequest) as refused:
        read(given, TTLS, default_ttl_s)
    assert refused.value.path == f"{LAST}.ttl"
    assert "tools[0].cache_control" in refused.value.allowed


@pytest.mark.parametrize(
    ("scopes", "ok"),
    [
        (("global", "org", "session"), True),
        (("org", None, "org"), True),
        (("org", None, "global"), False),
        (("session", "org"), False),
        ((None, "global"), True),
    ],
)
def test_scopes_only_narrow(scopes: tuple[str | None, ...], ok: bool) -> None:
    blocks = [text("x", {**EPHEMERAL, "scope": scope}) for scope in scopes]
    if ok:
        read(user(*blocks), TTLS)
        return
    with pytest.raises(BadRequest) as refused:
        read(user(*blocks), TTLS)
    assert refused.value.path == f"messages[0].content[{len(blocks) - 1}].cache_control.scope"


@pytest.mark.parametrize(
    ("user_id", "session"),
    [
        (json.dumps({"session_id": SESSION}), SESSION),
        (f"user_{'ab' * 32}_account_{SESSION}_session_{SESSION}", SESSION),
        (f"user_x_session_{SESSION}_more", None),
        ("just-a-name", None),
        (json.dumps({"session_id": 7}), None),
        (json.dumps({"session_id": ""}), None),
        ('{"session_id": "\\ud800"}', None),
        (json.dumps([SESSION]), None),
        ("[" * 4000, None),
        (json.dumps({"session_id": "x" * 5000}), None),
        (7, None),
        (None, None),
    ],
)
def test_session_in_the_user_id(user_id: object, session: str | None) -> None:
    assert read(body(metadata={"user_id": user_id}), TTLS).session == session


@pytest.mark.parametrize(
    ("max_tokens", "prewarm"), [(0, True), (1, False), (False, False), ("0", False), (None, False)]
)
def test_prewarm(max_tokens: object, prewarm: bool) -> None:
    assert read(body(max_tokens=max_tokens), TTLS).prewarm is prewarm


@pytest.mark.parametrize(
    ("diagnostics", "asked"),
    [({"previous_message_id": None}, True), ({}, True), (None, False)],
)
def test_diagnostics_on_the_first_turn(diagnostics: object, asked: bool) -> None:
    request = read(body(diagnostics=diagnostics), TTLS)
    assert (request.diagnose, request.previous_id) == (asked, None)


def test_params_are_what_else_can_change_the_prompt() -> None:
    params = {
        "thinking": {"type": "adaptive"},
        "output_config": {"effort": "low"},
        "chat_template_kwargs": {"enable_thinking": False},
    }
    assert read(body(**params, temperature=0.5, tool_choice=None), TTLS).params == params


BILLING = "x-anthropic-billing-header: cch=1;"


@pytest.mark.parametrize(
    ("given", "dropped"),
    [
        (body(system=[text(BILLING, EPHEMERAL), text("b")]), [True, False, False]),
        (body(system=[text(f"{BILLING}\nmore")], messages=[]), [True]),
        (body(system=BILLING, messages=[]), [True]),
        (body(system=f"{BILLING}\nmore", messages=[]), [False]),
        (user(text(BILLING)), [False]),
        (body(messages=[{"role": "system", "content": BILLING}]), [True]),
        (body(messages=[{"role": "system", "content": [text(BILLING)]}]), [True]),
        (body(messages=[{"role": "system", "content": f"see {BILLING}"}]), [False]),
        (body(system=[{"type": "text", "text": 7}], messages=[]), [False]),
    ],
)
def test_parts_that_never_reach_the_prompt(given: dict[str, Any], dropped: list[bool]) -> None:
    assert [is_dropped(part) for part in read(given, TTLS).parts] == dropped


def test_a_tool_schema_is_not_searched_for_markers() -> None:
    schema = {"type": "object", "properties": {"cache_control": {"type": "string"}}}
    use = {"type": "tool_use", "id": "1", "name": "a", "input": {"cache_control": "x"}}
    given = user(use, tools=[{"name": "a", "input_schema": schema}])
    request = read(given, TTLS)
    assert request.automatic
    assert [part.content for part in request.parts] == [{"name": "a", "input_schema": schema}, use]
