import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import pytest
from anthropic.types import Diagnostics as AnthropicDiagnostics
from openai.types.responses.response import PromptCacheDiagnostics
from pydantic import TypeAdapter

from tests.core.agent_session import TTLS, Agent, Body, Client, words
from vllm_cachescope.api.diagnostics import anthropic_diagnostics, openai_diagnostics
from vllm_cachescope.cache.miss_causes import NO_ROOM, CacheMiss, MissCause
from vllm_cachescope.diagnosis.attribution import EngineReport
from vllm_cachescope.diagnosis.changes import MAX_CHANGES, ChangeKind
from vllm_cachescope.diagnosis.comparison import compare
from vllm_cachescope.diagnosis.diagnosis import conclude, diagnose_against, measure
from vllm_cachescope.diagnosis.fingerprint import Fingerprint
from vllm_cachescope.diagnosis.outcome import NEW_CONTENT, Diagnosis, DiagnosisKind
from vllm_cachescope.prompt.request import Protocol
from vllm_cachescope.wire import READERS, anthropic, openai_responses

BETAS = {"anthropic-beta": "context-management-2025-06-27,claude-code-20250219"}
OTHER_BETAS = {"anthropic-beta": "claude-code-20250219"}


@dataclass(frozen=True)
class Row:
    """A single change to the second request of a conversation, and what it must be diagnosed as."""

    name: str
    change: Callable[[Body], object]
    kind: DiagnosisKind
    what: ChangeKind
    path: str
    names: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    headers: tuple[dict[str, str], dict[str, str]] = ({}, {})
    expected: bool = False


def agent(turns: int) -> Agent:
    made = Agent("table")
    made.params = {
        "thinking": {"type": "enabled", "budget_tokens": 2000},
        "tool_choice": {"type": "auto"},
        "output_config": {"effort": "medium"},
        "chat_template_kwargs": {"enable_thinking": True},
    }
    for i in range(turns):
        made.turn(calls=2 if i == 1 else 1)
    return made


def first_body() -> Body:
    return agent(3).body()


def next_body() -> Body:
    return agent(4).body()


def swap(items: list, i: int, j: int) -> None:
    items[i], items[j] = items[j], items[i]


def reversed_keys(value: Body) -> Body:
    return {key: value[key] for key in reversed(value)}


def rename(body: Body, i: int, name: str) -> None:
    body["tools"][i]["name"] = name


def set_at(path: str, value: object) -> Callable[[Body], None]:
    def change(body: Body) -> None:
        *keys, last = [int(key) if key.isdigit() else key for key in path.split("/")]
        for key in keys:
            body = body[key]
        body[last] = value

    return change


def edit_at(path: str, old: str = "", new: str = "!") -> Callable[[Body], None]:
    """Change a text; appends if ``old`` is empty, and replaces its first occurrence otherwise."""

    def change(body: Body) -> None:
        *keys, last = [int(key) if key.isdigit() else key for key in path.split("/")]
        for key in keys:
            body = body[key]
        before = body[last]
        body[last] = before.replace(old, new, 1) if old else before + new
        assert body[last] != before

    return change


def merge_messages(body: Body) -> None:
    """Give the blocks of two messages to one; nothing else changes."""
    body["messages"].insert(2, {"role": "user", "content": [body["messages"][0]["content"].pop()]})
    swap(body["messages"], 1, 2)


NEW_TOOL = {"name": "Zip", "description": "packs files", "input_schema": {"type": "object"}}
LATE = {"type": "text", "text": "A block that was not there before. " * 3}
M, P, T, S, H = (
    DiagnosisKind.MODEL_CHANGED,
    DiagnosisKind.PARAMS_CHANGED,
    DiagnosisKind.TOOLS_CHANGED,
    DiagnosisKind.SYSTEM_CHANGED,
    DiagnosisKind.MESSAGES_CHANGED,
)
C = ChangeKind

TABLE = [
    Row("model", set_at("model", "other"), M, C.MODEL, "model"),
    Row("thinking added", set_at("thinking/display", "omitted"), P, C.PARAM_ADDED,
        "thinking.display", ("thinking.display",)),
    Row("thinking budget", set_at("thinking/budget_tokens", 4000), P, C.PARAM_CHANGED,
        "thinking.budget_tokens", ("thinking.budget_tokens",)),
    Row("thinking removed", lambda b: b.pop("thinking"), P, C.PARAM_REMOVED,
        "thinking.budget_tokens", ("thinking.budget_tokens", "thinking.type")),
    Row("effort", set_at("output_config/effort", "high"), P, C.PARAM_CHANGED,
        "output_config.effort", ("output_config.effort",)),
    Row("output format", set_at("output_config/format", {"type": "json_schema", "schema": {}}), P,
        C.PARAM_ADDED, "output_config.format", ("output_config.format",)),
    Row("tool choice", set_at("tool_choice/type", "any"), P, C.PARAM_CHANGED, "tool_choice.type",
        ("tool_choice.type",)),
    Row("tool choice removed", lambda b: b.pop("tool_choice"), P, C.PARAM_REMOVED,
        "tool_choice.type", ("tool_choice.type",)),
    Row("template argument", set_at("chat_template_kwargs/enable_thinking", False), P,
        C.PARAM_CHANGED, "chat_template_kwargs.enable_thinking",
        ("chat_template_kwargs.enable_thinking",)),
    Row("template argument added", set_at("chat_template_kwargs/date", "today"), P, C.PARAM_ADDED,
        "chat_template_kwargs.date", ("chat_template_kwargs.date",)),
    Row("beta header added", lambda b: None, P, C.PARAM_ADDED, "anthropic-beta",
        ("anthropic-beta",), headers=({}, BETAS)),
    Row("beta header changed", lambda b: None, P, C.PARAM_CHANGED, "anthropic-beta",
        ("anthropic-beta",), headers=(BETAS, OTHER_BETAS)),
    Row("beta header removed", lambda b: None, P, C.PARAM_REMOVED, "anthropic-beta",
        ("anthropic-beta",), headers=(BETAS, {})),
    Row("tool appended", lambda b: b["tools"].append(NEW_TOOL), T, C.TOOLS_ADDED, "tools[24]",
        ("Zip",)),
    Row("tool inserted", lambda b: b["tools"].insert(7, NEW_TOOL), T, C.TOOLS_ADDED, "tools[7]",
        ("Zip",)),
    Row("first tool removed", lambda b: b["tools"].pop(0), T, C.TOOLS_REMOVED, "tools[0]",
        ("Bash",)),
    Row("last tool removed", lambda b: b["tools"].pop(), T, C.TOOLS_REMOVED, "tools[23]",
        ("Write",)),
    Row("all tools removed", lambda b: b.pop("tools"), T, C.TOOLS_REMOVED, "tools[0]"),
    Row("tools swapped", lambda b: swap(b["tools"], 3, 4), T, C.TOOLS_REORDERED, "tools[3]",
        ("Fetch",)),
    Row("tool moved to the front", lambda b: b["tools"].insert(0, b["tools"].pop(9)), T,
        C.TOOLS_REORDERED, "tools[0]", ("Move",)),
    Row("tools reversed", lambda b: b["tools"].reverse(), T, C.TOOLS_REORDERED, "tools[0]"),
    Row("tool description", edit_at("tools/5/description"), T, C.TOOL_CHANGED, "tools[5]",
        ("Glob",), ("description",)),
    Row("tool schema", set_at("tools/7/input_schema/properties/glob", {"type": "string"}), T,
        C.TOOL_CHANGED, "tools[7]", ("KillShell",), ("input_schema",)),
    Row("tool schema, required", set_at("tools/23/input_schema/required", ["path", "limit"]), T,
        C.TOOL_CHANGED, "tools[23]", ("Write",), ("input_schema",)),
    Row("tool field added", set_at("tools/2/strict", True), T, C.TOOL_CHANGED, "tools[2]",
        ("Edit",), ("strict",)),
    Row("tool schema, order of keys",
        lambda b: b["tools"][6].update(input_schema=reversed_keys(b["tools"][6]["input_schema"])),
        T, C.TOOL_KEYS_REORDERED, "tools[6]", ("Grep",)),
    Row("tool, order of keys", lambda b: b["tools"].__setitem__(1, reversed_keys(b["tools"][1])),
        T, C.TOOL_KEYS_REORDERED, "tools[1]", ("BashOutput",)),
    Row("tool renamed", lambda b: rename(b, 10, "Rewrite"), T, C.TOOLS_ADDED, "tools[10]",
        ("Rewrite", "MultiEdit")),
    Row("system block, a character", edit_at("system/1/text", "agent", "Agent"), S,
        C.SYSTEM_CHANGED, "system[1]"),
    Row("system block, its end", edit_at("system/2/text", "", " Today is Friday."), S,
        C.SYSTEM_CHANGED, "system[2]"),
    Row("system block replaced", set_at("system/2/text", "You write poems."), S, C.SYSTEM_CHANGED,
        "system[2]"),
    Row("system block added", lambda b: b["system"].append(LATE), S, C.SYSTEM_ADDED, "system[3]"),
    Row("system block before all", lambda b: b["system"].insert(0, LATE), S, C.SYSTEM_ADDED,
        "system[0]"),
    Row("system block removed", lambda b: b["system"].pop(1), S, C.SYSTEM_REMOVED, "system[1]"),
    Row("system removed", lambda b: b.pop("system"), S, C.SYSTEM_REMOVED, "system[1]"),
    Row("system blocks swapped", lambda b: swap(b["system"], 1, 2), S, C.SYSTEM_REORDERED,
        "system[1]"),
    Row("system as one text",
        lambda b: b.update(system="\n".join(block["text"] for block in b["system"][1:])), S,
        C.SYSTEM_CHANGED, "system"),
    Row("first question", edit_at("messages/0/content/1/text"), H, C.MESSAGES_CHANGED,
        "messages[0].content[1]"),
    Row("reminder changed", edit_at("messages/0/content/0/text"), H, C.MESSAGES_CHANGED,
        "messages[0].content[0]"),
    Row("reminder removed", lambda b: b["messages"][0]["content"].pop(0), H, C.MESSAGES_REMOVED,
        "messages[0].content[0]"),
    Row("reminder added", lambda b: b["messages"][2]["content"].append(LATE), H, C.MESSAGES_ADDED,
        "messages[2].content[1]"),
    Row("tool result", edit_at("messages/4/content/1/content"), H, C.MESSAGES_CHANGED,
        "messages[4].content[1]"),
    Row("tool result cleared", set_at("messages/2/content/0/content", "[cleared]"), H,
        C.MESSAGES_CHANGED, "messages[2].content[0]"),
    Row("tool result as error", set_at("messages/2/content/0/is_error", True), H,
        C.MESSAGES_CHANGED, "messages[2].content[0]"),
    Row("tool call's argument", set_at("messages/3/content/1/input/limit", 7777), H,
        C.MESSAGES_CHANGED, "messages[3].content[1]"),
    Row("tool call's id", set_at("messages/3/content/2/id", "toolu_other"), H, C.MESSAGES_CHANGED,
        "messages[3].content[2]"),
    Row("answer edited", edit_at("messages/1/content/0/text"), H, C.MESSAGES_CHANGED,
        "messages[1].content[0]"),
    Row("answer's text dropped", lambda b: b["messages"][1]["content"].pop(0), H,
        C.MESSAGES_REMOVED, "messages[1].content[0]"),
    Row("turn dropped", lambda b: b["messages"].__delitem__(slice(1, 3)), H, C.MESSAGES_REMOVED,
        "messages[1].content[0]"),
    Row("beginning dropped", lambda b: b["messages"].__delitem__(slice(0, 2)), H,
        C.MESSAGES_REMOVED, "messages[0].content[0]"),
    Row("message inserted",
        lambda b: b["messages"].insert(3, {"role": "user", "content": [dict(LATE)]}), H,
        C.MESSAGES_ADDED, "messages[3].content[0]"),
    Row("messages swapped", lambda b: swap(b["messages"], 2, 4), H, C.MESSAGES_REORDERED,
        "messages[2].content[0]"),
    Row("role", set_at("messages/2/role", "tool"), H, C.MESSAGES_CHANGED,
        "messages[2].content[0]"),
    Row("last question, once answered", edit_at("messages/6/content/0/content"), H,
        C.MESSAGES_CHANGED, "messages[6].content[0]"),
    Row("scope", set_at("system/1/cache_control/scope", "global"), DiagnosisKind.MARKERS_CHANGED,
        C.SCOPE_CHANGED, "system[1].cache_control.scope"),
    Row("last breakpoint removed",
        lambda b: b["messages"][-1]["content"][-1].pop("cache_control"),
        DiagnosisKind.MARKERS_CHANGED, C.MARK_REMOVED, "messages[6].content[0].cache_control"),
]  # fmt: skip


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_single_change(row: Row) -> None:
    client = Client()
    before, after = row.headers
    assert client.send(first_body(), headers=before).kind is DiagnosisKind.FIRST_REQUEST
    body = next_body()
    row.change(body)
    diagnosis = client.send(body, headers=after)
    assert diagnosis.kind is row.kind
    assert not diagnosis.expected
    assert diagnosis.changes[0].kind is row.what
    assert diagnosis.changes[0].path == row.path
    if row.names:
        assert diagnosis.names == row.names
    assert diagnosis.changes[0].fields == row.fields
    assert diagnosis.missed_tokens > 0
    assert diagnosis.suggestion
    assert diagnosis.where is not None and diagnosis.where.path == row.path
    # Only what was changed is reported, however it had to be described.
    assert {change.area for change in diagnosis.changes if change.diverges} <= {
        diagnosis.changes[0].area
    }
    # The next turn goes on from the changed request: one change, one break.
    later = agent(5).body()
    row.change(later)
    assert client.send(later, headers=after).kind is DiagnosisKind.CONTINUATION


def test_the_table_is_large_enough() -> None:
    assert len(TABLE) >= 40
    assert len({row.name for row in TABLE}) == len(TABLE)


HARMLESS: list[tuple[str, Callable[[Body], object]]] = [
    ("nothing", lambda b: None),
    ("sampling", lambda b: b.update(temperature=0.3, top_p=0.9, max_tokens=77, stream=True)),
    ("stop sequences", lambda b: b.update(stop_sequences=["x"])),
    ("user id", lambda b: b.update(metadata={"user_id": "someone"})),
    ("billing nonce", edit_at("system/0/text", "0a1b2", "9f8e7")),
    ("billing block dropped", lambda b: b["system"].pop(0)),
    ("text block as a string",
     lambda b: b["messages"].append({"role": "assistant", "content": "And?"})),
    ("breakpoint on a tool too", set_at("tools/3/cache_control", {"type": "ephemeral"})),
    ("order of parameters", lambda b: b.update(thinking=reversed_keys(b.pop("thinking")))),
    ("order of betas", lambda b: None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change"), HARMLESS, ids=[name for name, _ in HARMLESS])
def test_what_leaves_the_prompt_alone_is_no_break(
    name: str, change: Callable[[Body], object]
) -> None:
    client = Client()
    client.send(first_body(), headers=BETAS)
    body = next_body()
    change(body)
    shuffled = {"anthropic-beta": ",".join(reversed(BETAS["anthropic-beta"].split(",")))}
    diagnosis = client.send(body, headers=shuffled)
    assert diagnosis.kind is DiagnosisKind.CONTINUATION
    assert diagnosis.expected and diagnosis.missed_tokens == 0 and diagnosis.where is None
    assert not [change for change in diagnosis.changes if change.diverges]


def test_a_marked_text_block_and_the_string_it_becomes_are_one() -> None:
    client = Client()
    agent = Agent("flip")
    agent.messages = []
    agent.ask("What does the parser do? " * 20)
    client.send(agent.body())
    text = agent.messages[0]["content"][0]["text"]
    agent.turn()
    body = agent.body()
    body["messages"][0]["content"] = text
    assert client.send(body).kind is DiagnosisKind.CONTINUATION


def test_breakpoints_that_cost_nothing_are_noted_and_no_break() -> None:
    client = Client()
    client.send(first_body())
    body = next_body()
    del body["system"][1]["cache_control"]
    body["system"][2]["cache_control"]["ttl"] = "1h"
    diagnosis = client.send(body)
    assert diagnosis.kind is DiagnosisKind.CONTINUATION and diagnosis.expected
    assert [(c.kind, c.path) for c in diagnosis.changes] == [
        (C.MARK_REMOVED, "system[1].cache_control"),
        (C.TTL_CHANGED, "system[2].cache_control.ttl"),
    ]
    assert diagnosis.changes[1].before == "default" and diagnosis.changes[1].after == "1h"


def test_size_deltas_and_names_are_reported() -> None:
    client = Client()
    client.send(first_body())
    body = next_body()
    added = " The build of today is broken."
    body["system"][2]["text"] += added
    change = client.send(body).changes[0]
    assert change.chars_before is not None and change.chars_after is not None
    assert change.chars_after - change.chars_before == len(added)
    # Its first 8,000 characters are as before: the divergence is found inside the block.
    block = client.node.fingerprint.start(client.node.fingerprint.static_parts - 1)
    assert block + 1500 < change.token < block + 2000


def test_combined_changes_come_earliest_first() -> None:
    """Every pair of changes in different places: the earlier is the cause, the other is listed."""
    order = {M: 0, T: 1, S: 2, P: 3, H: 4}
    rows = [
        row
        for row in TABLE
        if row.name
        in (
            "model",
            "effort",
            "tool schema",
            "tools swapped",
            "tool appended",
            "system block, its end",
            "system block removed",
            "tool result",
            "answer edited",
        )
    ]
    for one, other in product(rows, rows):
        if order[one.kind] >= order[other.kind]:
            continue
        client = Client()
        client.send(first_body())
        body = next_body()
        one.change(body)
        other.change(body)
        diagnosis = client.send(body)
        assert diagnosis.kind is one.kind, (one.name, other.name)
        assert diagnosis.changes[0].kind is one.what
        assert other.what in {change.kind for change in diagnosis.changes[1:]}
        tokens = [change.token for change in diagnosis.changes if change.diverges]
        assert tokens == sorted(tokens)


def test_everything_at_once() -> None:
    client = Client()
    client.send(first_body())
    body = next_body()
    for row in TABLE:
        if row.name in ("tool description", "tool inserted", "tools swapped", "effort",
                        "system block, a character", "tool result", "model"):  # fmt: skip
            row.change(body)
    diagnosis = client.send(body)
    assert [change.kind for change in diagnosis.changes] == [
        C.MODEL,
        C.TOOLS_REORDERED,
        C.TOOL_CHANGED,
        C.TOOLS_ADDED,
        C.SYSTEM_CHANGED,
        C.PARAM_CHANGED,
        C.MESSAGES_CHANGED,
    ]


def test_what_slides_away_is_not_said_to_come_back() -> None:
    client, agent = Client(), Agent("slides", scale=0.1)
    seen = []
    for _ in range(6):
        client.send(agent.turn().turn().body())
        del agent.messages[1:3]
        seen.append(client.send(agent.body()).flapping)
    assert [field.returns for field in seen if field] == [False] * 5

    client, agent = Client(), Agent("comes and goes", scale=0.1)
    block = {"type": "text", "text": "You may use the network. " * 20}
    seen = []
    for i in range(6):
        agent.system = [*agent.system, block] if i % 2 else agent.system[:3]
        seen.append(client.send(agent.turn().body()).flapping)
    assert [field.returns for field in seen if field] == [True] * 4


def test_no_more_changes_are_worked_out_than_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    old = [{"role": "user" if i % 2 else "assistant", "content": f"{i}"} for i in range(4090)]
    new = [{**m, "content": m["content"] + "!" * (i % 2)} for i, m in enumerate(old)]
    client, named = Client(), []
    fingerprints = [client.fingerprint({"model": "m", "messages": m}) for m in (old, new)]
    path = Fingerprint.path
    monkeypatch.setattr(Fingerprint, "path", lambda *args: named.append(args) or path(*args))
    assert len(compare(*fingerprints)) == len(named) == MAX_CHANGES


def test_a_flapping_field_is_told_from_its_second_change_on() -> None:
    client = Client()
    agent = Agent("latch")
    client.send(agent.body())
    seen = []
    for round_ in range(6):
        agent.turn()
        agent.params = {"chat_template_kwargs": {"enable_thinking": bool(round_ % 2)}}
        seen.append(client.send(agent.body()).flapping)
    # It was absent, then False, True, False, …: back at an earlier value with the third change.
    assert seen[0] is None
    assert [field.flips for field in seen[1:] if field] == [2, 3, 4, 5, 6]
    assert [field.returns for field in seen[1:] if field] == [False, True, True, True, True]
    assert seen[-1] is not None
    assert seen[-1].field == "chat_template_kwargs.enable_thinking"
    assert seen[-1].tokens_lost > seen[-2].tokens_lost > 0


def test_a_nonce_is_told_from_a_flag() -> None:
    client = Client()
    agent = Agent("nonce")
    diagnosis = client.send(agent.body())
    for round_ in range(4):
        agent.turn()
        agent.system[1]["text"] = f"You are an agent. Request {round_:08d}."
        diagnosis = client.send(agent.body())
    assert diagnosis.kind is DiagnosisKind.SYSTEM_CHANGED
    assert diagnosis.flapping is not None
    assert (diagnosis.flapping.flips, diagnosis.flapping.returns) == (4, False)
    assert "is new each time" in diagnosis.suggestion


# What the engine says


def continuation(client: Client | None = None) -> tuple[Client, Diagnosis]:
    client = client or Client()
    agent = Agent("engine").turn()
    client.send(agent.body())
    client.node.prompt_tokens = 8000
    agent.turn()
    return client, client.send(agent.body())


def conclude_last(client: Client, diagnosis: Diagnosis, report: EngineReport) -> Diagnosis:
    assert client.placement is not None
    return conclude(diagnosis, report, client.placement.ancestor)


def check_sums(diagnosis: Diagnosis, read: int) -> None:
    assert sum(tokens for _, tokens in diagnosis.uncached) == diagnosis.prompt_tokens - read
    assert all(tokens > 0 for _, tokens in diagnosis.uncached)


MISSES = [
    (CacheMiss(MissCause.EXPIRED, 7936, "cpu", ttl_s=300, age_s=12.5), "1h"),
    (CacheMiss(MissCause.EVICTED, 7936, "device", detail="capacity"), "memory"),
    (CacheMiss(MissCause.NEVER_STORED, 7936, "cpu", detail="store dropped"), "store dropped"),
    (CacheMiss(MissCause.TIER_UNAVAILABLE, 7936, "redis"), "tier"),
    (CacheMiss(MissCause.TIMED_OUT, 7936, "redis"), "deadline"),
    (CacheMiss(MissCause.TIMED_OUT, 7936, "redis", detail=f"{NO_ROOM} within 0.4 s"), "cpu_bytes"),
    (CacheMiss(MissCause.ENGINE_RESTARTED, 7936), "outlives"),
    (CacheMiss(MissCause.OTHER_REPLICA, 7936, detail="replica-2"), "replica"),
    (CacheMiss(MissCause.HASH_SETTINGS_DIFFER, 7936), "hash"),
]


@pytest.mark.parametrize(
    ("miss", "advice"), MISSES, ids=[f"{miss.cause} {miss.detail}" for miss, _ in MISSES]
)
def test_engine_causes(miss: CacheMiss, advice: str) -> None:
    client, diagnosis = continuation()
    final = conclude_last(client, diagnosis, EngineReport(9000, 0, 128, (miss,)))
    assert final.cause == miss.cause
    assert final.kind is DiagnosisKind.CONTINUATION and not final.expected
    assert final.engine[0] == miss
    assert advice in final.suggestion
    # 8,000 tokens were there before; all but the last, partial block was lost.
    assert dict(final.uncached) == {
        miss.cause: 7936,
        MissCause.PARTIAL_BLOCK: 64,
        NEW_CONTENT: 1000,
    }
    check_sums(final, 0)


def test_what_a_request_waited_for_is_told() -> None:
    client, diagnosis = continuation()
    final = conclude_last(client, diagnosis, EngineReport(9000, 7936, 128, memory_wait_s=0.0804))
    assert final.waited == "waited for memory 80 ms" == final.to_dict()["waited"]
    client, diagnosis = continuation()
    final = conclude_last(client, diagnosis, EngineReport(9000, 7936, 128))
    assert "waited" not in final.to_dict()


def test_several_tiers_each_explain_their_tokens() -> None:
    client, diagnosis = continuation()
    misses = (
        CacheMiss(MissCause.EVICTED, 3968, "device"),
        CacheMiss(MissCause.TIMED_OUT, 1920, "redis"),
    )
    final = conclude_last(client, diagnosis, EngineReport(9000, 2048, 128, misses))
    assert final.cause == MissCause.EVICTED
    assert [miss.tokens for miss in final.engine] == [3968, 1920, 64]
    check_sums(final, 2048)


def test_a_full_read_needs_no_cause() -> None:
    client, diagnosis = continuation()
    final = conclude_last(client, diagnosis, EngineReport(9000, 7936, 128))
    assert final.expected and final.cause == DiagnosisKind.CONTINUATION and final.suggestion == ""
    assert dict(final.uncached) == {MissCause.PARTIAL_BLOCK: 64, NEW_CONTENT: 1000}


def test_a_prefix_shorter_than_a_block_was_never_stored() -> None:
    client = Client()
    agent = Agent("short", tools=[], scale=0.02)
    client.send(agent.body())
    client.node.prompt_tokens = 90
    agent.turn()
    final = conclude_last(client, client.send(agent.body()), EngineReport(140, 0, 128))
    assert final.cause == MissCause.NEVER_STORED
    assert final.engine[0].detail == "shorter than one block of 128 tokens"
    check_sums(final, 0)


def test_what_no_breakpoint_covers_was_never_stored() -> None:
    client = Client()
    agent = Agent("uncovered", tools=[]).turn().turn()
    body = agent.body()
    del body["messages"][-1]["content"][-1]["cache_control"]
    client.send(body)
    client.node.prompt_tokens = 4000
    covered = client.node.fingerprint.covered_tokens
    assert 0 < covered < client.node.fingerprint.tokens
    agent.turn()
    body = agent.body()
    del body["messages"][-1]["content"][-1]["cache_control"]
    diagnosis = client.send(body)
    read = round(covered * 4000 / client.placement.ancestor.fingerprint.tokens) // 128 * 128
    final = conclude_last(client, diagnosis, EngineReport(4500, read, 128))
    assert final.cause == MissCause.NEVER_STORED
    assert final.engine[0].detail == "not covered by a breakpoint"
    assert final.unknown_tokens < 128
    check_sums(final, read)


def test_a_loss_nobody_reports_is_unknown_and_counted() -> None:
    client, diagnosis = continuation()
    final = conclude_last(client, diagnosis, EngineReport(9000, 0, 128))
    assert final.cause == MissCause.UNKNOWN
    assert final.unknown_tokens == 7936
    check_sums(final, 0)


def test_a_change_the_engine_read_past_cost_nothing() -> None:
    """A parameter that the template ignores: the prompt's tokens are the same."""
    client = Client()
    client.send(first_body())
    client.node.prompt_tokens = 9000
    body = next_body()
    body["tool_choice"]["type"] = "any"
    diagnosis = client.send(body)
    assert diagnosis.kind is DiagnosisKind.PARAMS_CHANGED and not diagnosis.expected
    final = conclude_last(client, diagnosis, EngineReport(10000, 8960, 128))
    assert final.expected and final.missed_tokens == 0 and final.suggestion == ""
    check_sums(final, 8960)


def test_a_change_explains_what_it_cost_and_no_more() -> None:
    client = Client()
    client.send(first_body())
    body = next_body()
    body["system"][1]["text"] += "!"
    diagnosis = client.send(body)
    scale = 10000 / diagnosis.prompt_tokens
    shared = round(diagnosis.shared_tokens * scale)
    read = shared // 128 * 128
    final = conclude_last(client, diagnosis, EngineReport(10000, read, 128))
    causes = dict(final.uncached)
    assert final.cause == DiagnosisKind.SYSTEM_CHANGED and not final.expected
    (change,), place = final.changes, final.where
    assert place is not None and change.token == place.token == round(
        diagnosis.changes[0].token * scale
    )
    assert causes[DiagnosisKind.SYSTEM_CHANGED] == final.missed_tokens > 1000
    assert MissCause.UNKNOWN not in causes
    check_sums(final, read)


def test_a_harmless_change_may_cost_the_last_block_where_the_prompt_ends_with_it() -> None:
    client = Client()
    client.send(first_body())
    client.node.prompt_tokens = 8192
    body = first_body()
    body["tool_choice"]["type"] = "any"
    final = conclude_last(client, client.send(body), EngineReport(8192, 8064, 128))
    assert final.expected and final.missed_tokens == 0


def test_a_retry_recomputes_its_last_block() -> None:
    client, _ = continuation()
    agent = Agent("engine").turn().turn()
    diagnosis = client.send(agent.body())
    assert diagnosis.kind is DiagnosisKind.RETRY
    final = conclude_last(client, diagnosis, EngineReport(8192, 8064, 128))
    assert final.expected
    assert dict(final.uncached) == {MissCause.PARTIAL_BLOCK: 128}


def test_first_requests_explain_themselves() -> None:
    client = Client()
    diagnosis = client.send(first_body())
    final = conclude_last(client, diagnosis, EngineReport(5000, 2048, 128))
    assert final.expected and dict(final.uncached) == {DiagnosisKind.FIRST_REQUEST: 2952}


def test_every_token_gets_a_cause_whatever_the_engine_says() -> None:
    rng = random.Random(5)
    for _ in range(3000):
        client, diagnosis = rng.choice(SHAPES)
        prompt = rng.randrange(1, 20000)
        read = rng.randrange(prompt + 1)
        misses = tuple(
            CacheMiss(rng.choice(list(MissCause)), rng.randrange(1, 9000))
            for _ in range(rng.randrange(4))
        )
        shared = rng.choice([None, rng.randrange(prompt + 1)])
        report = EngineReport(prompt, read, rng.choice([1, 16, 128]), misses, shared)
        final = conclude_last(client, diagnosis, report)
        check_sums(final, read)
        assert 0 <= final.missed_tokens <= prompt
        json.dumps(final.to_dict())


def _shapes() -> list[tuple[Client, Diagnosis]]:
    shapes = [continuation()]
    for row in TABLE[::7]:
        client = Client()
        client.send(first_body())
        body = next_body()
        row.change(body)
        shapes.append((client, client.send(body)))
    client = Client()
    shapes.append((client, client.send(first_body())))
    return shapes


SHAPES = _shapes()


# What the clients' own packages make of it

ANTHROPIC = TypeAdapter(AnthropicDiagnostics)
OPENAI = TypeAdapter(PromptCacheDiagnostics)


def asked(body: Body) -> anthropic.PromptRequest:
    return anthropic.read(body | {"diagnostics": {"previous_message_id": "msg_1"}}, TTLS)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("model", "model_changed"),
        ("tool schema", "tools_changed"),
        ("tools swapped", "tools_changed"),
        ("system block, its end", "system_changed"),
        ("tool result", "messages_changed"),
        ("turn dropped", "messages_changed"),
        ("effort", "unavailable"),
        ("beta header added", "unavailable"),
    ],
)
def test_anthropic_reasons(name: str, reason: str) -> None:
    row = next(row for row in TABLE if row.name == name)
    client = Client()
    body = next_body()
    row.change(body)
    old = client.fingerprint(first_body(), headers=row.headers[0])
    new = client.fingerprint(body, headers=row.headers[1])
    data = anthropic_diagnostics(asked(body), diagnose_against(old, new))
    assert data is not None
    ANTHROPIC.validate_python(data, strict=True)
    found = data["cache_miss_reason"]
    assert found["type"] == reason
    assert ("cache_missed_input_tokens" in found) == (reason != "unavailable")
    assert found.get("cache_missed_input_tokens", 1) > 0


def test_anthropic_states() -> None:
    client = Client()
    old, new = client.fingerprint(first_body()), client.fingerprint(next_body())
    same = diagnose_against(old, new)
    assert anthropic_diagnostics(anthropic.read(next_body(), TTLS), same) is None
    first = next_body() | {"diagnostics": {"previous_message_id": None}}
    assert anthropic_diagnostics(anthropic.read(first, TTLS), None) is None
    assert anthropic_diagnostics(asked(next_body()), same) is None
    pending = anthropic_diagnostics(asked(next_body()), None, pending=True)
    assert pending == {"cache_miss_reason": None}
    ANTHROPIC.validate_python(pending, strict=True)
    unknown = anthropic_diagnostics(asked(next_body()), None)
    assert unknown == {"cache_miss_reason": {"type": "previous_message_not_found"}}
    ANTHROPIC.validate_python(unknown, strict=True)


def test_anthropic_speed_counts_as_the_model() -> None:
    client = Client()
    body = next_body() | {"speed": "fast"}
    diagnosis = diagnose_against(client.fingerprint(first_body()), client.fingerprint(body))
    data = anthropic_diagnostics(asked(body), diagnosis)
    assert data is not None and data["cache_miss_reason"]["type"] == "model_changed"
    # It does not change the prompt, so a conversation goes on all the same.
    client.send(first_body())
    assert client.send(body).kind is DiagnosisKind.CONTINUATION


def responses_body(turns: int = 2) -> Body:
    items: list[Body] = [{"role": "user", "content": words(random.Random(9), 500)}]
    for i in range(turns):
        items += [
            {"type": "reasoning", "id": f"rs_{i}", "summary": []},
            {"type": "function_call", "call_id": f"c{i}", "name": "read", "arguments": "{}"},
            {
                "type": "function_call_output",
                "call_id": f"c{i}",
                "output": words(random.Random(i), 900),
            },
        ]
    return {
        "model": "m",
        "instructions": words(random.Random(1), 3000),
        "tools": [
            {"type": "function", "name": n, "description": f"can {n} files", "parameters": {}}
            for n in ("read", "write", "run")
        ],
        "input": items,
        "reasoning": {"effort": "low"},
        "text": {"verbosity": "low", "format": {"type": "text"}},
        "prompt_cache_key": "key",
        "service_tier": "default",
        "prompt_cache_options": {"comparison_response_id": "resp_1"},
    }


def compacted(body: Body) -> None:
    body["input"][1:4] = [{"type": "compaction", "encrypted_content": "x" * 500}]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (set_at("model", "other"), "model_changed"),
        (set_at("prompt_cache_key", "other"), "prompt_cache_key_changed"),
        (lambda b: swap(b["tools"], 0, 1), "tools_changed"),
        (set_at("text/format", {"type": "json_object"}), "text_format_changed"),
        (set_at("reasoning/effort", "high"), "reasoning_effort_changed"),
        (set_at("text/verbosity", "high"), "verbosity_changed"),
        (compacted, "context_compacted"),
        (edit_at("instructions"), "input_changed"),
        (edit_at("input/3/output"), "input_changed"),
        (set_at("service_tier", "flex"), "service_tier_changed"),
    ],
)
def test_openai_reasons(change: Callable[[Body], None], reason: str) -> None:
    client = Client()
    body = responses_body(3)
    change(body)
    diagnosis = diagnose_against(
        client.fingerprint(responses_body(), Protocol.RESPONSES),
        client.fingerprint(body, Protocol.RESPONSES),
    )
    data = openai_diagnostics(openai_responses.read(body, TTLS), diagnosis)
    assert data is not None and (data["type"], data.get("reason")) == ("cache_miss", reason)
    OPENAI.validate_python(data, strict=True)


def namespace(**about: str) -> Body:
    """A namespace of tools, as Responses has it; ``about`` describes each tool."""
    tools = [
        {"type": "function", "name": name, "description": words, "parameters": {"type": "object"}}
        for name, words in about.items()
    ]
    return {"type": "namespace", "name": "mcp__docs", "description": "Docs.", "tools": tools}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (namespace(find="Finds more.", read="Reads."), "mcp__docs.find (description)"),
        (
            namespace(find="Finds more.", read="Reads more."),
            "mcp__docs.find, mcp__docs.read (description)",
        ),
        (
            namespace(find="Finds.", read="Reads.", sort="Sorts."),
            "mcp__docs.sort (type, name, description, parameters)",
        ),
        (
            {**namespace(find="Finds.", read="Reads."), "description": "D"},
            "mcp__docs (description)",
        ),
    ],
)
def test_a_tool_inside_a_namespace_is_named(changed: Body, named: str) -> None:
    client = Client()
    bodies = (responses_body(), responses_body(3))
    for body, tool in zip(bodies, (namespace(find="Finds.", read="Reads."), changed), strict=True):
        body["tools"].insert(1, tool)
    made = [client.fingerprint(body, Protocol.RESPONSES) for body in bodies]
    first = compare(*made)[0]
    assert str(first).startswith(f"tool_changed at tools[1]: {named}, ")


def chat_body(turns: int = 2) -> Body:
    body = responses_body(turns)
    messages = [{"role": "system", "content": body.pop("instructions")}]
    for item in body.pop("input"):
        if "role" in item:
            messages.append(item)
        elif item["type"] == "function_call_output":
            call = {"id": item["call_id"], "type": "function", "function": {"name": "read"}}
            messages += [
                {"role": "assistant", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]},
            ]
    tools = [{"type": "function", "function": {"name": tool["name"]}} for tool in body["tools"]]
    effort, text = body.pop("reasoning")["effort"], body.pop("text")
    return {
        **body,
        "tools": tools,
        "messages": messages,
        "reasoning_effort": effort,
        "verbosity": text["verbosity"],
        "response_format": text["format"],
    }


def schema(name: str) -> Body:
    return {"type": "json_schema", "json_schema": {"name": name, "schema": {"type": "object"}}}


def compacted_chat(body: Body) -> None:
    body["messages"][2:6] = [{"role": "user", "content": [{"type": "compaction", "text": "…"}]}]


@pytest.mark.parametrize(
    ("protocol", "change", "reason"),
    [
        (Protocol.CHAT, set_at("model", "other"), "model_changed"),
        (Protocol.CHAT, set_at("prompt_cache_key", "other"), "prompt_cache_key_changed"),
        (Protocol.CHAT, lambda b: b.pop("prompt_cache_key"), "prompt_cache_key_changed"),
        (Protocol.CHAT, lambda b: swap(b["tools"], 0, 1), "tools_changed"),
        (Protocol.CHAT, set_at("response_format", {"type": "json_object"}), "text_format_changed"),
        (Protocol.CHAT, set_at("response_format", schema("a")), "text_format_changed"),
        (Protocol.CHAT, lambda b: b.pop("response_format"), "text_format_changed"),
        (Protocol.CHAT, set_at("reasoning_effort", "high"), "reasoning_effort_changed"),
        (Protocol.CHAT, lambda b: b.pop("reasoning_effort"), "reasoning_effort_changed"),
        (Protocol.CHAT, set_at("verbosity", "high"), "verbosity_changed"),
        (Protocol.CHAT, lambda b: b.pop("verbosity"), "verbosity_changed"),
        (Protocol.CHAT, compacted_chat, "context_compacted"),
        (Protocol.CHAT, edit_at("messages/0/content"), "input_changed"),
        (Protocol.CHAT, edit_at("messages/3/content"), "input_changed"),
        (Protocol.CHAT, set_at("service_tier", "flex"), "service_tier_changed"),
        (Protocol.CHAT, lambda b: b.pop("service_tier"), "service_tier_changed"),
        (Protocol.RESPONSES, lambda b: b.pop("prompt_cache_key"), "prompt_cache_key_changed"),
        (Protocol.RESPONSES, set_at("text/format", schema("a")), "text_format_changed"),
        (Protocol.RESPONSES, lambda b: b["text"].pop("format"), "text_format_changed"),
        (Protocol.RESPONSES, lambda b: b.pop("reasoning"), "reasoning_effort_changed"),
        (Protocol.RESPONSES, lambda b: b["text"].pop("verbosity"), "verbosity_changed"),
        (Protocol.RESPONSES, set_at("verbosity", "high"), "verbosity_changed"),
        (Protocol.RESPONSES, lambda b: b.pop("service_tier"), "service_tier_changed"),
    ],
)
def test_openai_reasons_as_the_parameters_arrive(
    protocol: Protocol, change: Callable[[Body], None], reason: str
) -> None:
    client, made = Client(), chat_body if protocol is Protocol.CHAT else responses_body
    body = made(3)
    change(body)
    old, new = client.fingerprint(made(), protocol), client.fingerprint(body, protocol)
    data = openai_diagnostics(READERS[protocol](body, TTLS), diagnose_against(old, new))
    assert data is not None and (data["type"], data.get("reason")) == ("cache_miss", reason)
    OPENAI.validate_python(data, strict=True)


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("reasoning_effort", "high", "reasoning_effort_changed"),
        ("prompt_cache_key", "other", "prompt_cache_key_changed"),
        ("service_tier", "flex", "service_tier_changed"),
        ("model", "other", "model_changed"),
        ("tool_choice", "required", None),
        ("prompt_cache_options/ttl", "1h", None),
    ],
)
def test_openai_has_a_reason_only_for_what_was_not_read(
    path: str, value: str, reason: str | None
) -> None:
    client, body = Client(), chat_body(3)
    set_at(path, value)(body)
    request = READERS[Protocol.CHAT](body, TTLS)
    client.send(chat_body(), Protocol.CHAT)
    client.node.prompt_tokens = 1500
    new = client.fingerprint(body, Protocol.CHAT)
    compared = diagnose_against(client.node.fingerprint, new)

    def told(read: int) -> Body | None:
        measured = measure(compared, EngineReport(1600, read, 16), client.node)
        return openai_diagnostics(request, measured, read_tokens=read)

    assert told(1488) == {"type": "cache_hit"}
    missed = told(160)
    assert missed is not None
    if reason is None:
        hit = path.startswith("prompt_cache_options")
        assert missed == {"type": "cache_hit" if hit else "unavailable"}
        return
    assert (missed["type"], missed["reason"]) == ("cache_miss", reason)
    routed = path in ("prompt_cache_key", "service_tier")
    shared = 1500 if routed else 160
    assert missed["comparison_reusable_tokens"] == shared
    assert missed["cache_missed_tokens"] == 1488 - 160


def test_openai_states() -> None:
    client = Client()
    body = responses_body(3)
    request = openai_responses.read(body, TTLS)
    old = client.fingerprint(responses_body(), Protocol.RESPONSES)
    same = diagnose_against(old, client.fingerprint(body, Protocol.RESPONSES))
    assert openai_diagnostics(replace(request, diagnose=False), same) is None
    cases = [
        (openai_diagnostics(request, same), "cache_hit"),
        (openai_diagnostics(request, same, read_tokens=100), "cache_hit"),
        (openai_diagnostics(request, same, read_tokens=0), "unavailable"),
        (openai_diagnostics(request, None), "comparison_response_not_found"),
    ]
    body["tool_choice"] = "required"
    other = diagnose_against(old, client.fingerprint(body, Protocol.RESPONSES))
    cases.append((openai_diagnostics(request, other), "unavailable"))
    for data, type_ in cases:
        assert data == {"type": type_}
        OPENAI.validate_python(data, strict=True)
