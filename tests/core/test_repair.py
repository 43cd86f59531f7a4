"""What is put right in requests: never another meaning, never what another session said, and never
instead of the client's own request."""

import json
import random
import sys
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from anthropic.types import Diagnostics
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from pydantic import TypeAdapter
from starlette.types import Message, Receive, Scope, Send

from tests.core.test_middleware import Nothing
from vllm_cachescope.api.client_request import ClientRequest
from vllm_cachescope.api.diagnoser import Diagnoser
from vllm_cachescope.api.middleware import CacheScopeMiddleware
from vllm_cachescope.api.services import Server
from vllm_cachescope.cache.report import EngineId, Report, Row
from vllm_cachescope.cli import main
from vllm_cachescope.config import Config, ConfigError, load
from vllm_cachescope.diagnosis.outcome import Diagnosis
from vllm_cachescope.prompt.request import Protocol
from vllm_cachescope.repair.repairer import Mended, Repairer
from vllm_cachescope.repair.spelling import tool_in_any_spelling
from vllm_cachescope.tenancy.scope import Caller
from vllm_cachescope.tenancy.scope import Scope as CacheScope
from vllm_cachescope.wire import READERS

ME = Caller("acme", "s")
MARK = {"cache_control": {"type": "ephemeral"}}
HEADS = [
    {"pattern": r"Nonce: \w+\n"},
    {"pattern": r"Now: [^\n]*\n", "action": "move"},
]
EVERYTHING = {
    "tools_order": True,
    "json_form": True,
    "latched_field": True,
    "latched_params": ["chat_template_kwargs.today"],
    "volatile_head": HEADS,
}


class Session:
    """A repairer with a driven clock, and requests that the server accepts."""

    def __init__(self, **repair: Any) -> None:
        self.now = 0.0
        config = load({"repair": repair, "tenants": {"0" * 64: "acme"}})
        self.repairer = Repairer(config.repair, config.repair_of_orgs(), lambda: self.now)

    def asks(
        self, body: dict[str, Any], caller: Caller = ME, protocol: Protocol = Protocol.MESSAGES
    ) -> Mended:
        before = deepcopy(body)
        mended = self.repairer.mend(caller, protocol, body)
        assert body == before
        self.repairer.learn(mended.lessons)
        return mended


def tool(name: str, **more: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": {"a": {}, "b": {}}, "required": ["a", "b"]}
    return {"name": name, "input_schema": schema, **more}


def body(*tools: dict[str, Any], system: str = "You help.", **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Hi"}]
    return {"tools": list(tools), "system": system, "messages": messages, **more}


def names(mended: Mended) -> list[str]:
    return [one["name"] for one in mended.fields["tools"]]


def kinds(mended: Mended) -> list[str]:
    return [repair.kind.value for repair in mended.repairs]


def test_nothing_is_put_right_unless_the_operator_says_so() -> None:
    config = Config()
    repairer = Repairer(config.repair, {}, lambda: 0.0)
    assert not repairer.is_used
    assert not repairer.is_on(ME, Protocol.MESSAGES)


def test_each_organisation_has_what_the_operator_chose_for_it() -> None:
    config = load(
        {
            "tenants": {"0" * 64: "acme", "1" * 64: "other"},
            "repair": {"tools_order": True, "orgs": {"acme": {}}},
        }
    )
    repairer = Repairer(config.repair, config.repair_of_orgs(), lambda: 0.0)
    assert not repairer.is_on(Caller("name:acme", "s"), Protocol.CHAT)
    assert repairer.is_on(Caller("name:other", "s"), Protocol.CHAT)
    assert not repairer.is_on(Caller("name:other", None), Protocol.CHAT)
    assert not repairer.is_on(Caller("name:other", "s"), Protocol.COMPLETIONS)


@pytest.mark.parametrize(
    ("repair", "problem"),
    [
        ({"volatile_head": [{"pattern": "(?=a)"}]}, "RE2"),
        ({"volatile_head": [{"pattern": "a*"}]}, "empty text"),
        ({"volatile_head": [{"pattern": "a", "action": "drop"}]}, "action"),
        ({"latched_params": ["temperature"]}, "latched_params"),
        ({"orgs": {"nobody": {}}}, "nobody"),
    ],
)
def test_a_wrong_setting_is_refused(repair: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load({"repair": repair}).check(lambda tier: None)


def test_tools_keep_the_order_in_which_the_session_first_used_them() -> None:
    session = Session(tools_order=True)
    assert session.asks(body(tool("a"), tool("b"), tool("c"))).repairs == ()
    back = session.asks(body(tool("c"), tool("b"), tool("a")))
    assert (names(back), kinds(back)) == (["a", "b", "c"], ["tools_order"])
    # One that leaves and comes back has its place; a new one comes last, wherever it was put.
    assert names(session.asks(body(tool("c"), tool("a")))) == ["a", "c"]
    assert names(session.asks(body(tool("d"), tool("b"), tool("a")))) == ["a", "b", "d"]
    assert names(session.asks(body(tool("a"), tool("d"), tool("c")))) == ["a", "c", "d"]


def test_no_tool_passes_a_breakpoint() -> None:
    session = Session(tools_order=True)
    session.asks(body(tool("a"), tool("b"), tool("c"), tool("d", **MARK)))
    whole = session.asks(body(tool("d"), tool("b"), tool("a"), tool("c", **MARK)))
    assert names(whole) == ["a", "b", "c", "d"]
    assert [("cache_control" in one) for one in whole.fields["tools"]] == [False] * 3 + [True]
    # What the first breakpoint shares holds no tool but those that the client put there.
    parted = session.asks(body(tool("d"), tool("c", **MARK), tool("b"), tool("a", **MARK)))
    assert names(parted) == ["c", "d", "a", "b"]
    assert [("cache_control" in one) for one in parted.fields["tools"]] == [False, True] * 2


def test_tools_that_cannot_be_told_apart_stay_where_they_are() -> None:
    session = Session(tools_order=True)
    session.asks(body(tool("a"), tool("b")))
    twice = session.asks(body(tool("b"), tool("a"), tool("a")))
    assert (names(twice), twice.repairs) == (["b", "a", "a"], ())


def test_a_schema_is_spelled_as_it_first_was() -> None:
    session = Session(json_form=True)
    first = body(tool("a", **MARK))
    session.asks(first)
    other = tool("a", **MARK)
    other["input_schema"] = {
        "required": ["b", "a"],
        "properties": {"b": {}, "a": {}},
        "type": "object",
    }
    mended = session.asks(body(other))
    assert json.dumps(mended.fields) == json.dumps(first)
    assert kinds(mended) == ["json_form"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"default": ["a", "b"]}, {"default": ["b", "a"]}),
        ({"default": {"required": ["a", "b"]}}, {"default": {"required": ["b", "a"]}}),
        ({"anyOf": [{"type": "a"}, {"type": "b"}]}, {"anyOf": [{"type": "b"}, {"type": "a"}]}),
        ({"maximum": 1}, {"maximum": True}),
        ({"maximum": 1}, {"maximum": 1.0}),
        ({"minLength": 0}, {"minLength": False}),
        ({"properties": {"title": {}}}, {"properties": {}}),
        ({"properties": {"readOnly": {"const": False}}}, {"properties": {}}),
        ({"default": {"title": ""}}, {"default": {}}),
        ({"enum": ["", "a"]}, {"enum": ["a"]}),
        ({"description": "a"}, {"description": "b"}),
    ],
)
def test_what_means_something_else_is_another_schema(one: Any, other: Any) -> None:
    def spelled(schema: Any, any_defaults: bool) -> bytes:
        return tool_in_any_spelling({"input_schema": schema}, any_defaults=any_defaults)

    for any_defaults in (False, True):
        assert spelled(one, any_defaults) != spelled(other, any_defaults) or one == {"minLength": 0}
    session = Session(json_form=True, latched_field=True)
    session.asks(body({"name": "a", "input_schema": one}))
    changed = body({"name": "a", "input_schema": other})
    mended = session.asks(changed)
    assert json.dumps(mended.fields) == json.dumps(changed)


def test_a_field_that_says_what_its_absence_says_is_latched() -> None:
    session = Session(latched_field=True)
    session.asks(body(tool("a")))
    flapped = tool("a", description=None)
    flapped["input_schema"] = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        **flapped["input_schema"],
        "additionalProperties": True,
    }
    mended = session.asks(body(flapped))
    assert mended.fields["tools"] == [tool("a")]
    assert kinds(mended) == ["latched_field"]
    flapped["input_schema"]["additionalProperties"] = False
    assert session.asks(body(flapped)).repairs == ()


def call(arguments: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": "Hi"},
            {
                "role": "assistant",
                "tool_calls": [
                    {
                        "id": "1",
                        "type": "function",
                        "function": {"name": "f", "arguments": arguments},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "1", "content": "done"},
        ]
    }


@pytest.mark.parametrize(
    ("first", "later", "is_same"),
    [
        ('{"a": 1, "b": 2}', '{"b":2,"a":1}', True),
        ('{"a": {"x": 1, "y": [1, 2]}}', '{"a":{"y":[1,2],"x":1}}', True),
        ('{"a": [1, 2]}', '{"a": [2, 1]}', False),
        ('{"a": 1}', '{"a": 1.0}', False),
        ('{"a": 1}', '{"a": "1"}', False),
        ('{"a": 1, "a": 2}', '{"a":2}', False),
        ('{"a": 1.50}', '{"a":1.5}', False),
        ('{"a": 1', '{"a":1', False),
        ('{"a": 123456789012345678901234567890}', '{"a":123456789012345678901234567890}', False),
    ],
)
def test_the_input_of_a_call_is_spelled_as_it_first_was(
    first: str, later: str, is_same: bool
) -> None:
    session = Session(json_form=True)
    session.asks(call(first), protocol=Protocol.CHAT)
    mended = session.asks(call(later), protocol=Protocol.CHAT)
    function = mended.fields["messages"][1]["tool_calls"][0]["function"]
    assert function["arguments"] == (first if is_same else later)
    assert kinds(mended) == ["json_form"] * is_same


def test_a_head_is_held_at_its_first_value_or_moved_behind_the_last_breakpoint() -> None:
    session = Session(volatile_head=HEADS)
    first = session.asks(body(system="Nonce: a\nNow: Monday\nYou help. Nonce: x\n"))
    assert first.fields["system"] == "Nonce: a\nYou help. Nonce: x\n"
    second = session.asks(body(system="Now: Tuesday\nNonce: b\nYou help. Nonce: x\n"))
    assert second.fields["system"] == first.fields["system"]
    assert second.fields["messages"][-1]["content"] == [
        {"type": "text", "text": "Hi"},
        {"type": "text", "text": "Now: Tuesday"},
    ]
    # What is not at the head, or not of the system prompt, is nobody's business.
    plain = body(system="You help.\nNonce: c\n")
    plain["messages"][0]["content"] = "Nonce: d\nHi"
    assert session.asks(plain).fields is plain


def test_a_head_that_cannot_be_moved_stays() -> None:
    session = Session(volatile_head=HEADS)
    session.asks(body(system="Nonce: a\nYou help."))
    prefilled = body(system="Nonce: b\nNow: Monday\nYou help.")
    prefilled["messages"].append({"role": "assistant", "content": "I"})
    mended = session.asks(prefilled)
    assert mended.fields["system"] == "Nonce: a\nNow: Monday\nYou help."
    assert mended.fields["messages"] == prefilled["messages"]
    # A prompt of nothing else would be empty.
    assert session.asks(body(system="Now: Monday\n")).repairs == ()


def test_no_pattern_and_no_text_takes_long() -> None:
    session = Session(volatile_head=[{"pattern": r"(?:(?:a+)+)+b"}, {"pattern": r"(?:x|x|xx)+y"}])
    began = time.process_time()
    for letter in "ax":
        session.asks(body(system=letter * 1_000_000))
    assert time.process_time() - began < 1
    # A match that might go on behind what patterns see is none.
    session = Session(volatile_head=[{"pattern": r"a+"}])
    session.asks(body(system="a" * 10 + " end"))
    assert session.asks(body(system="a" * 1_000_000)).repairs == ()


def test_a_parameter_keeps_its_first_value_absence_included() -> None:
    session = Session(latched_params=["chat_template_kwargs.today"])
    other = Caller("acme", "other")
    session.asks(body(chat_template_kwargs={"today": "Monday", "thinking": False}))
    mended = session.asks(body(chat_template_kwargs={"today": "Tuesday", "thinking": True}))
    assert mended.fields["chat_template_kwargs"] == {"today": "Monday", "thinking": True}
    assert session.asks(body()).fields["chat_template_kwargs"] == {"today": "Monday"}
    session.asks(body(), other)
    gone = session.asks(body(chat_template_kwargs={"today": "Tuesday"}), other)
    assert "chat_template_kwargs" not in gone.fields


def test_no_session_is_repaired_by_what_another_said() -> None:
    session = Session(**EVERYTHING)
    session.asks(body(tool("a"), tool("b"), system="Nonce: a\nYou help."))
    swapped = body(tool("b"), tool("a"), system="Nonce: b\nYou help.")
    for other in (Caller("acme", "t"), Caller("evil", "s")):
        assert session.asks(swapped, other).fields is swapped


def test_a_session_is_forgotten_with_time_and_when_it_is_purged() -> None:
    session = Session(tools_order=True, json_form=True, ttl="1h")
    given, swapped = body(tool("a"), tool("b")), body(tool("b"), tool("a"))
    session.asks(given)
    session.now += 3599
    assert session.asks(swapped).repairs
    session.now += 3601
    assert not session.asks(swapped).repairs
    assert session.asks(given).repairs
    memory = session.repairer.memory
    memory.purge("other", None)
    memory.purge("acme", "t")
    assert session.asks(given).repairs
    memory.purge("acme", "s")
    assert (len(memory), memory.size) == (0, 0)
    assert not session.asks(given).repairs


def test_a_purge_also_reaches_requests_that_are_under_way() -> None:
    session = Session(tools_order=True)
    mine = session.repairer.mend(ME, Protocol.MESSAGES, body(tool("a")))
    others = session.repairer.mend(Caller("other", "s"), Protocol.MESSAGES, body(tool("a")))
    session.repairer.memory.purge("acme", None)
    for mended in (mine, others):
        session.repairer.learn(mended.lessons)
    assert len(session.repairer.memory) == 1


def test_what_one_organisation_has_remembered_pushes_out_no_others() -> None:
    session = Session(tools_order=True, json_form=True, max_bytes="64KiB")
    session.asks(body(tool("a"), tool("b")))
    for i in range(60):
        tools = [tool(f"{i} {k} " + "x" * 100) for k in range(50)]
        session.asks(body(*tools), Caller("loud", str(i)))
        assert session.repairer.memory.size <= 2**16
    assert session.asks(body(tool("b"), tool("a"))).repairs


HOSTILE: list[Any] = [
    {"tools": 5, "messages": "x", "system": {"a": 1}},
    {"tools": [None, 5, {"name": 7}, {"function": 3}], "messages": [None, {"content": 5}]},
    {"tools": [tool("a"), tool("x" * 10_000)]},
    {"tools": [{"name": "a", "input_schema": {"enum": [{"a": 1}, 2**70, "\ud800"]}}]},
    {"system": ["Nonce: a\n", {"type": "text"}, {"type": "text", "text": "Nonce: \ud800\n"}]},
    {"system": "Nonce: a\n\ud800", "messages": []},
    {"messages": [{"role": "user", "tool_calls": [{"function": {"arguments": [1]}}, 3]}]},
    {"chat_template_kwargs": 5},
]


@pytest.mark.parametrize("protocol", Protocol)
@pytest.mark.parametrize("given", HOSTILE)
def test_whatever_is_sent_is_left_to_the_server(given: Any, protocol: Protocol) -> None:
    session = Session(**EVERYTHING)
    for _ in range(2):
        assert session.asks(given, protocol=protocol).fields is given


def test_deep_values_are_left_alone() -> None:
    deep: Any = {}
    for _ in range(50_000):
        deep = {"properties": deep}
    session = Session(**EVERYTHING)
    given = {"tools": [{"name": "a", "input_schema": deep}]}
    mended = session.repairer.mend(ME, Protocol.MESSAGES, given)
    assert mended.fields is given


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.text("ab", max_size=3))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["a", "required", "enum", "properties", "default", "title"]),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=8,
)


def other_way_round(value: Any, chance: random.Random) -> Any:
    """Return ``value`` with its keys in another order."""
    if isinstance(value, dict):
        keys = list(value)
        chance.shuffle(keys)
        return {key: other_way_round(value[key], chance) for key in keys}
    return [other_way_round(one, chance) for one in value] if isinstance(value, list) else value


@settings(max_examples=30)
@given(st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=4), st.randoms())
def test_a_repair_changes_spellings_and_places_and_nothing_else(
    schemas: list[tuple[Any, Any]], chance: random.Random
) -> None:
    session = Session(tools_order=True, json_form=True)
    tools = [
        {"name": str(i), "input_schema": one, "more": two} for i, (one, two) in enumerate(schemas)
    ]
    given = {
        "tools": tools,
        "messages": [
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": str(i), "name": "x", "input": one}],
            }
            for i, (one, _) in enumerate(schemas)
        ],
    }
    session.asks(given)
    changed = other_way_round(given, chance)
    chance.shuffle(changed["tools"])
    mended = session.asks(changed)
    # JSON objects are equal whatever the order of their keys; lists are not.
    assert mended.fields == given
    assert json.dumps(mended.fields["tools"]) == json.dumps(tools)
    for message, earlier in zip(mended.fields["messages"], given["messages"], strict=True):
        assert json.dumps(message["content"][0]["input"]) == json.dumps(
            earlier["content"][0]["input"]
        )


SAVED = "cachescope_repaired_tokens_total"


class Diagnosed(Session):
    """A session whose requests are diagnosed, of which everything is read that is as it was."""

    def __init__(self, tools_behind_system: bool | None = None, **repair: Any) -> None:
        super().__init__(**repair)
        self.registry = CollectorRegistry()
        self.diagnoser = Diagnoser(
            b"sixteen bytes or so",
            16,
            lambda: 0.0,
            lambda: 5.0,
            registry=self.registry,
            tools_behind_system=lambda: tools_behind_system,
        )

    def diagnosed(self, given: dict[str, Any], read: int, prompt: int) -> Diagnosis:
        mended = self.asks(given)
        reader = READERS[Protocol.MESSAGES]
        client = ClientRequest(reader(given, (300,)), given, mended.repairs)
        rows = (
            Row("read_device", CacheScope.ORG, 300, read),
            Row("created", CacheScope.ORG, 300, prompt - read),
        )
        reports = {"nonce": Report(rows, engine=EngineId(0, "epoch"))}
        request = reader(mended.fields, (300,))
        pending = self.diagnoser.open(ME, request, mended.fields, {}, reports, client=client)
        self.diagnoser.close(pending, reports.values(), "id")
        return pending.diagnosis

    def counted(self, name: str, kind: str) -> float:
        labels = {"model_name": "", "engine": "0", "kind": kind}
        return self.registry.get_sample_value(name, labels) or 0.0


def test_a_client_that_changes_once_and_stays_there_saves_once() -> None:
    session = Diagnosed(tools_order=True)
    texts = ["word " * 200, "other " * 200, "more " * 200]
    tools = [tool(name, description=text) for name, text in zip("abc", texts, strict=True)]
    swapped = [tools[i] for i in (2, 1, 0)]
    assert session.diagnosed(body(*tools), 0, 800).repaired == ()
    for turn, saves in enumerate((True, False)):
        found = session.diagnosed(body(*swapped), 784, 800)
        # It was put right, and so it is no break.
        assert not found.kind.is_break and found.expected and not found.missed_tokens
        (repair,) = found.repaired
        assert repair.saved_tokens == (784 if saves else 0)
        assert repair.change.startswith("tools_reordered at tools[0]") == saves
        assert found.to_dict()["repaired"] == [repair.to_dict()]
        assert session.counted("cachescope_repairs_total", "tools_order") == turn + 1
        assert session.counted(SAVED, "tools_order") == 784
    assert session.diagnoser.breaks.recent(None) == []
    # Back to the first order: unrepaired it would be another change.
    assert session.diagnosed(body(*tools), 784, 800).repaired == ()


def test_what_is_saved_counts_for_the_repair_that_stands_first() -> None:
    session = Diagnosed(**EVERYTHING)
    long = "word " * 400
    first = body(tool("a", description=long), tool("b"), system="Nonce: a\n" + long)
    session.diagnosed(first, 0, 1000)
    second = body(tool("b"), tool("a", description=long), system="Nonce: b\n" + long)
    repaired = {one.kind: one for one in session.diagnosed(second, 992, 1000).repaired}
    assert {kind.value: one.saved_tokens for kind, one in repaired.items()} == {
        "tools_order": 992,
        "volatile_head": 0,
    }
    assert {one.change.partition(" ")[0] for one in repaired.values()} == {
        "tools_reordered",
        "system_changed",
    }
    # Of a session that was purged nothing is known that anything could have been saved of.
    session.diagnoser.purge("acme", "s")
    assert {one.saved_tokens for one in session.diagnosed(second, 992, 1000).repaired} == {0}


@pytest.mark.parametrize("tools_behind_system", [True, False, None])
def test_what_is_saved_depends_on_where_the_template_has_the_tools(
    tools_behind_system: bool | None,
) -> None:
    session = Diagnosed(tools_behind_system, tools_order=True, volatile_head=HEADS)
    long = "word " * 400
    tools, system = [tool("a", description=long), tool("b", description=long)], "Nonce: a\n" + long
    session.diagnosed(body(*tools, system=system), 0, 1600)
    # Tools take two thirds of the prompt, the system prompt one.
    (head,) = session.diagnosed(body(*tools, system=system.replace("a", "b")), 1584, 1600).repaired
    assert head.saved_tokens == pytest.approx(1584 if tools_behind_system else 528, abs=80)
    session = Diagnosed(tools_behind_system, tools_order=True, volatile_head=HEADS)
    session.diagnosed(body(*tools, system=system), 0, 1600)
    (order,) = session.diagnosed(body(*tools[::-1], system=system), 1584, 1600).repaired
    assert order.saved_tokens == pytest.approx(1056 if tools_behind_system else 1584, abs=80)


def test_what_broke_all_the_same_is_still_a_break() -> None:
    session = Diagnosed(tools_order=True)
    long = "word " * 400
    session.diagnosed(body(tool("a"), tool("b"), system=long), 0, 600)
    found = session.diagnosed(body(tool("b"), tool("a"), system="New. " + long), 0, 600)
    assert (found.kind, found.expected) == ("system_changed", False)
    assert [one.saved_tokens for one in found.repaired] == [0]
    (seen,) = session.diagnoser.breaks.recent(None)
    assert seen.to_dict()["repaired"][0]["kind"] == "tools_order"


def test_clients_that_ask_for_diagnostics_are_told() -> None:
    session = Session(tools_order=True)
    diagnoser = Diagnoser(b"sixteen bytes or so", 16, registry=CollectorRegistry())

    def answered(*tools: dict[str, Any], **asks: Any) -> Any:
        given = body(*tools, **asks)
        mended = session.asks(given)
        reader = READERS[Protocol.MESSAGES]
        client = ClientRequest(reader(given, (300,)), given, mended.repairs)
        pending = diagnoser.open(
            ME, reader(mended.fields, (300,)), mended.fields, {}, {}, client=client
        )
        diagnoser.close(pending, (), "msg_1")
        return pending.answer()

    assert answered(tool("a"), tool("b")) is None
    asks = {"diagnostics": {"previous_message_id": "msg_1"}}
    assert answered(tool("a"), tool("b"), **asks) is None
    told = answered(tool("b"), tool("a"), **asks)
    TypeAdapter(Diagnostics).validate_python(told)
    assert told["cache_miss_reason"] is None
    assert [one["kind"] for one in told["repaired"]] == ["tools_order"]


def test_patterns_need_re2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "re2", None)
    load({"repair": {"tools_order": True}})
    with pytest.raises(ConfigError, match=r"vllm-cachescope\[repair\]"):
        load({"repair": {"volatile_head": [{"pattern": "a"}]}})


def test_explain_says_what_repairs_would_have_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "word " * 300
    tools = [tool(name, description=name + long) for name in "abc"]
    lines, turns = [], []
    for turn in range(5):
        turns.append({"role": "user", "content": f"{turn} {long}"})
        system = f"Nonce: {turn:04x}\nYou help."
        given = body(*tools[turn % 3 :], *tools[: turn % 3], system=system)
        given |= {"model": "m", "messages": list(turns)}
        lines.append(json.dumps({"session_id": "s", "timestamp": 1.7e9 + turn, "body": given}))
        turns.append({"role": "assistant", "content": f"answer {turn}"})
    path, config = tmp_path / "calls.jsonl", tmp_path / "cachescope.yaml"
    path.write_text("\n".join(lines))
    config.write_text(json.dumps({"repair": {"tools_order": True, "volatile_head": HEADS[:1]}}))

    def tried(*options: str) -> Any:
        assert main.main(["explain", str(path), "--json", *options]) == 0
        return json.loads(capsys.readouterr().out)

    plain = tried()
    assert "repairs" not in plain
    alone = tried("--repair")["repairs"]
    assert alone["reusable_tokens"] == plain["reusable_tokens"]
    assert set(alone["kinds"]) == {"tools_order", "json_form", "latched_field", "all"}
    assert alone["kinds"]["tools_order"]["requests"] == 3
    assert alone["kinds"]["json_form"] == {"requests": 0, "saved_tokens": 0}
    both = tried("--repair-config", str(config))["repairs"]["kinds"]
    assert set(both) == {"tools_order", "volatile_head", "all"}
    # All but the first prompt and what is new in each of the others.
    assert both["all"]["saved_tokens"] > 2 * both["tools_order"]["saved_tokens"] > 0
    # As much as a log has that was repaired in this way before it was recorded.
    session = Session(tools_order=True, volatile_head=HEADS[:1])
    repaired = [json.loads(line) for line in lines]
    for record in repaired:
        record["body"] = session.asks(record["body"]).fields
    path.write_text("\n".join(map(json.dumps, repaired)))
    after = tried()["reusable_tokens"]
    assert both["all"]["saved_tokens"] == after - plain["reusable_tokens"]
    config.write_text("{}")
    assert main.main(["explain", str(path), "--repair-config", str(config)]) == 2
    assert "puts nothing right" in capsys.readouterr().err


class Front(CacheScopeMiddleware):
    """The API side in front of a server that refuses some orders of tools."""

    def __init__(self, refused: str, status: int = 400) -> None:
        super().__init__(self.answer)
        self.refused, self.status = refused, status
        self.seen: list[str] = []
        self.registry = CollectorRegistry()

    def connect(self, state: Any) -> Server:
        config = load({"secret": "a secret of the tests", "repair": {"tools_order": True}})
        return Server(config, "m", 16, (), Nothing(), lambda *_: None, self.registry)

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = json.loads((await receive())["body"])
        self.seen.append("".join(one["name"] for one in given["tools"]))
        is_refused = self.seen[-1] == self.refused
        if is_refused and self.status == 0:
            raise RuntimeError("the server falls over")
        headers = [(b"content-type", b"application/json")]
        status = self.status if is_refused else 200
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"id": "1"}'})

    async def ask(self, order: str, **headers: str) -> int:
        sent: list[Message] = []

        async def receive() -> Message:
            raw = json.dumps({"model": "m", **body(*map(tool, order))}).encode()
            return {"type": "http.request", "body": raw, "more_body": False}

        async def send(message: Message) -> None:
            sent.append(message)

        named = {"x-cachescope-session": "s", **headers}
        raw_headers = [(name.encode(), value.encode()) for name, value in named.items()]
        scope = {"type": "http", "method": "POST", "path": "/v1/messages", "headers": raw_headers}
        await self({**scope, "app": type("App", (), {"state": None})()}, receive, send)
        (start,) = (one for one in sent if one["type"] == "http.response.start")
        return int(start["status"])

    def failures(self, reason: str) -> float | None:
        labels = {"model_name": "m", "engine": "none", "reason": reason}
        return self.registry.get_sample_value("cachescope_repair_failures_total", labels)


@pytest.mark.parametrize("status", [400, 500, 0], ids=["refused", "failed", "raised"])
async def test_what_the_server_takes_unrepaired_is_served_unrepaired(status: int) -> None:
    front = Front("ab", status)
    front.refused = ""
    assert await front.ask("ab") == 200
    front.refused = "ab"
    assert await front.ask("ba") == 200
    assert front.seen == ["ab", "ab", "ba"]
    assert front.failures("refused") == 1
    # Nothing of this session is repaired from then on.
    assert await front.ask("ba") == 200
    assert front.seen == ["ab", "ab", "ba", "ba"]


async def test_what_was_refused_teaches_nothing() -> None:
    front = Front("ab")
    assert await front.ask("ab") == 400
    assert await front.ask("ba") == 200
    assert front.seen == ["ab", "ba"]


async def test_a_client_may_have_its_request_served_as_it_is() -> None:
    front = Front("")
    for headers in ({}, {"x-cachescope-repair": "off"}, {}):
        await front.ask("ab" if not front.seen else "ba", **headers)
    assert front.seen == ["ab", "ba", "ab"]
    assert await front.ask("ab", **{"x-cachescope-repair": "on"}) == 400


async def test_a_mistake_in_a_repair_costs_the_repair(monkeypatch: pytest.MonkeyPatch) -> None:
    front = Front("")

    def fails(*args: Any) -> Mended:
        raise RuntimeError("a mistake")

    monkeypatch.setattr(Repairer, "mend", fails)
    assert await front.ask("ba") == 200
    assert (front.seen, front.failures("error")) == (["ba"], 1)
