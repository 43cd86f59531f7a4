import argparse
import io
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.core.agent_session import TTLS, Agent, Body
from vllm_cachescope.cli import lint as command
from vllm_cachescope.cli.lint_rules import Severity, lint
from vllm_cachescope.cli.traffic import Call
from vllm_cachescope.wire import anthropic, openai_chat, openai_completions

WARNING, INFO = Severity.WARNING, Severity.INFO


def call(body: Body, line: int = 1) -> Call:
    return Call(f"calls.jsonl:{line}", None, "s", anthropic.read(body, TTLS))


def found(*bodies: Body) -> list[tuple[str, str, Severity]]:
    calls = [call(body, line) for line, body in enumerate(bodies, 1)]
    return [(f.rule, f.path, f.severity) for f in lint(calls)]


def warnings(*bodies: Body) -> set[tuple[str, str]]:
    return {(rule, path) for rule, path, severity in found(*bodies) if severity is WARNING}


def agent(text: str = "") -> Agent:
    """An agent whose tools have sorted keys and whose second system block ends with ``text``."""
    made = Agent("lint", scale=0.2)
    made.tools = json.loads(json.dumps(made.tools[:4], sort_keys=True))
    made.system[1]["text"] += " " + text
    return made


def unmarked(body: Body) -> Body:
    for block in body["system"]:
        block.pop("cache_control", None)
    body["messages"][-1]["content"][-1].pop("cache_control", None)
    return body


def test_a_clean_request() -> None:
    assert found(agent().body(), agent().turn().body()) == []


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("It is 2026-11-21T10:15:30Z.", "timestamp"),
        ("It is 2026-11-21 10:15.", "timestamp"),
        ("Started at 10:15:30.", "timestamp"),
        ("epoch=1795255530", "timestamp"),
        ("epoch_ms=1795255530123", "timestamp"),
        ("Today is 2026-11-21.", "date"),
        ("Today is November 21, 2026.", "date"),
        ("Today is 21 Nov 2026.", "date"),
        ("Today is 11/21/2026.", "date"),
        ("Today is 21.11.2026.", "date"),
        ("Session 6fa459ea-ee8a-3ca4-894e-db77e160355e.", "uuid"),
        ("It is 10:15 AM.", "timestamp"),
        ("It is 9:30:12\u202fp.m. in Berlin.", "timestamp"),
        ("Current time: 10:15", "timestamp"),
        ("Now: 10:15:30.123", "timestamp"),
        ("The time is 9:00 AM.", "timestamp"),
        ("Log 20261121T101530Z.", "timestamp"),
        ("Log 20261121-101530.log", "timestamp"),
        ("epoch: 1500000000", "timestamp"),
        ("1795255530123456", "timestamp"),
        ("1795255530123456789", "timestamp"),
        ("2026.11.21.", "date"),
        ("Today is 20261121.", "date"),
        ("21-Nov-2026", "date"),
        ("Saturday, November 21", "date"),
        ("It is Sat, 21 Nov", "date"),
        ("SATURDAY, NOVEMBER 21, 2026", "date"),
        ("on november 21, 2026", "date"),
        ("21st of November 2026", "date"),
        ("今天是2026年11月21日。", "date"),
        ("今天是2026-11-21。", "date"),
        ("11/21/26", "date"),
        ("21/11/26", "date"),
        ("nonce=ab12cd", "nonce"),
        ("session_id: abc123def", "nonce"),
        ("sessionId=8ab3f2", "nonce"),
        ("Your session id is k3j9x2.", "nonce"),
        ("<session_id>k3j9x2</session_id>", "nonce"),
        ('"conversation_id": "c-4711"', "nonce"),
        ("X-Correlation-Id: 44a7-bc", "nonce"),
        ("run_id=84729104", "nonce"),
        ("0AF7651916CD43DD8448EB211C80319C", "nonce"),
        ("01ARZ3NDEKTSV4RRFFQ69G5FAV", "nonce"),
        ("req_011CSHoEeqs5C35K2UUqR7Fy", "nonce"),
        ("msg_01XFDUDYJgAACzvnptvVoYEL", "nonce"),
        ("Work in /tmp/tmpab12cd3x/repo.", "nonce"),
        ("<Agent object at 0x7f3c2a1b9d40>", "nonce"),
        ("Request-Id: 7f3k-22", "nonce"),
        ("trace_id: 0af7651916cd43dd", "nonce"),
        ("commit 4b825dc642cb6eb9a060e54bf8d69288fbee4904", "nonce"),
    ],
)
def test_volatile_text_in_the_system_prompt(text: str, rule: str) -> None:
    assert warnings(unmarked(agent(text).body())) == {(rule, "system[1]")}


@pytest.mark.parametrize(
    "text",
    [
        "Answer within 2 to 10 seconds, version 2.1.0 or 3.14.",
        "Use port 8080, at most 1000000 rows, RFC 2119, ISO 8601.",
        "Call deadbeef or 0123456789012345 if a facade decade is feed.",
        "Ratios such as 10:1 and 16:9; a request identifier is optional.",
        "In 2026 we moved from 5-6 people to 20.",
        "request id: must be unique; run id: string, the id of the run; trace id = your id",
        "salt: 1000 grams, session id: uuid4, trace_id: int64, run id: 3-letter code",
        "Business hours are 09:00:00 to 17:30, from 9:00 AM to 5:30PM.",
        "ratio 1:20:30, phone 1555123456, order 20261121",
        "anthropic-version: 2023-06-01, api_version=2024-10-21",
        'Use gpt-4o-2024-08-06 or {"version": "2025-03-26"}.',
        "The time format is HH:MM:SS, such as 09:00:00; the time limit is 00:05:00.",
        "Color 0xFFFFFFFF, mask 0x00ff00ff; msg_handlers, run_benchmark, call_later.",
        "The run is done\nat 10:15; it may be 2 or 3 tests in march or may 20.",
        "Version 1.2.2026.1 of a/1/2/25/b; ABCDEFGHJKMNPQRSTVWXYZABCD; 01234567890123456789012345",
    ],
)
def test_plain_text_is_not_volatile(text: str) -> None:
    assert found(unmarked(agent(text).body())) == []


def test_a_system_block_that_differs_in_each_request_is_a_warning() -> None:
    """Whatever it is that changes in it."""

    def asked(turns: int, weather: str) -> Body:
        made = agent()
        for _ in range(turns):
            made.turn()
        body = made.body()
        body["system"].append({"type": "text", "text": f"The weather is {weather}."})
        return body

    def at_last(*weathers: str) -> list[str]:
        bodies = [asked(turns, weather) for turns, weather in enumerate(weathers)]
        return [path for rule, path in warnings(*bodies) if rule == "changing_system"]

    assert at_last("fair", "foul", "wet") == ["system[3]"]
    # Another agent of the session, or a block that changes now and then, is none.
    assert at_last("fair", "foul") == at_last("fair", "foul", "fair") == []


@pytest.mark.parametrize(
    ("text", "severity"),
    [
        ("Write dates like 2026-01-31.", INFO),
        ("For example 6fa459ea-ee8a-3ca4-894e-db77e160355e.", INFO),
        ("The charter of 2026-01-31 holds.", INFO),  # the same in all requests
        ("Today is 2026-01-31.", WARNING),
    ],
)
def test_a_value_that_stays_is_a_note(text: str, severity: Severity) -> None:
    bodies = [unmarked(agent(text).turn().body()) for _ in range(2)]
    assert [one for *_, one in found(*bodies)] == [severity]


def test_a_value_that_changes_is_a_warning_whatever_stands_before_it() -> None:
    bodies = [unmarked(agent(f"The charter of 2026-01-3{i} holds.").body()) for i in range(2)]
    assert {severity for *_, severity in found(*bodies)} == {WARNING}


def test_a_breakpoint_that_stays_while_the_conversation_grows() -> None:
    made = agent()
    stuck, moving = [], []
    for _ in range(3):
        moving.append(made.turn().body())
        stuck.append(made.body())
        del stuck[-1]["messages"][-1]["content"][-1]["cache_control"]
    assert warnings(*stuck) == {("stuck_breakpoint", "system[2].cache_control")}
    assert warnings(*moving) == warnings(*stuck[:2]) == set()


def test_only_what_is_shared_is_looked_at() -> None:
    made = agent()
    made.ask("It is 2026-11-21T10:15:30Z, nonce=abc123def.")
    assert found(made.body()) == []


@pytest.mark.parametrize(
    ("prompt", "paths"),
    [
        ("It is 2026-11-21. Say hello.", ["prompt"]),
        (["Say hello.", "It is 2026-11-21."], ["prompt[1]"]),
        ([1, 2, 3], []),
        ("word " * 400 + "2026-11-21", []),
        ("system: " + "word " * 400 + "2026-11-21\n\nuser: Hello", ["prompt"]),
        ("system: Be brief.\n\nuser: It is 2026-11-21.", []),
        ("user: It is 2026-11-21.", []),
    ],
)
def test_the_head_of_a_prompt_that_is_one_text(prompt: Any, paths: list[str]) -> None:
    body = {"model": "m", "prompt": prompt, "cache_control": {"type": "ephemeral"}}
    request = openai_completions.read(body, TTLS)
    findings = lint([Call("calls.jsonl:1", None, None, request)])
    assert [(f.rule, f.path, f.severity) for f in findings] == [("date", p, WARNING) for p in paths]


def test_tools_may_give_examples() -> None:
    made = agent()
    made.tools[2]["input_schema"]["properties"]["path"]["description"] = "such as 2026-01-31"
    assert found(made.body()) == [
        ("date", "tools[2].input_schema.properties.path.description", INFO)
    ]


def test_what_changes_in_a_tool_is_volatile() -> None:
    bodies = [agent().body() for _ in range(3)]
    for i, body in enumerate(bodies):
        text = f"Such as 2026-01-31. Generated at 2026-11-21T10:15:3{i}"
        body["tools"][2]["description"] = text
    at = "tools[2].description"
    assert warnings(bodies[0], bodies[0]) == set()
    late = ("breakpoint_after_volatile", "system[1].cache_control")
    assert warnings(*bodies) == {("timestamp", at), late}
    assert ("date", at, INFO) in found(*bodies)
    by_rule = {f.rule: f.requests for f in lint(map(call, bodies))}
    assert by_rule == {"timestamp": 3, "date": 3, "breakpoint_after_volatile": 2}


def test_the_billing_header_is_left_out_of_the_prompt_for_messages_only() -> None:
    assert found(agent().body()) == []
    header = agent().system[0]["text"]
    chat = {"model": "m", "messages": [{"role": "system", "content": header + "\nBe brief."}]}
    calls = [Call("calls.jsonl:1", None, None, openai_chat.read(chat, TTLS))]
    assert [(f.rule, f.path) for f in lint(calls)] == [("nonce", "messages[0].content")]


def test_breakpoints_after_volatile_blocks() -> None:
    late = ("breakpoint_after_volatile", "system[1].cache_control")
    assert warnings(agent("Today is 2026-11-21.").body()) == {("date", "system[1]"), late}
    body = agent("Today is 2026-11-21.").body()
    del body["system"][1]["cache_control"], body["system"][2]["cache_control"]
    last = ("breakpoint_after_volatile", "messages[0].content[1].cache_control")
    assert warnings(body) == {("date", "system[1]"), last}


def test_a_breakpoint_before_the_volatile_block_is_fine() -> None:
    made = agent()
    made.system.append({"type": "text", "text": "Today is 2026-11-21."})
    body = unmarked(made.body())
    body["system"][2]["cache_control"] = {"type": "ephemeral"}
    assert warnings(body) == {("date", "system[3]")}


def test_unsorted_json() -> None:
    made = agent()
    first = made.body()
    turned = made.copy("turned")
    turned.tools[1] = dict(reversed(turned.tools[1].items()))
    second = turned.body()
    assert warnings(first, second) == {("unsorted_json", "tools[1]")}
    assert ("unsorted_json", "tools", INFO) in found(second)
    assert warnings(second) == set()


@pytest.mark.parametrize("key", ["required", "enum"])
def test_lists_whose_order_changes(key: str) -> None:
    bodies = [agent().body() for _ in range(3)]
    for body, names in zip(bodies, (["a", "b"], ["b", "a"], ["b", "a", "c"]), strict=True):
        body["tools"][1]["input_schema"][key] = names
        body["tools"][1] = dict(sorted(body["tools"][1].items()))
    assert warnings(*bodies) == {("unsorted_json", f"tools[1].input_schema.{key}")}
    assert warnings(bodies[0], bodies[2]) == set()


def test_tool_order_that_changes() -> None:
    made = agent()
    first = made.body()
    made.tools.reverse()
    assert warnings(first, made.body()) == {("tool_order", "tools[0]")}
    made.tools.pop()
    assert warnings(first, made.body()) == {("tool_order", "tools[0]")}


def test_tool_order_between_sessions_and_as_tools_come_and_go() -> None:
    bodies = [agent().body() for _ in range(4)]
    tools = bodies[0]["tools"]
    bodies[1]["tools"] = [*tools[1:], {"name": "New", "input_schema": {}}]
    bodies[2]["tools"] = [tools[0], tools[2], tools[1], tools[3]]
    bodies[3]["tools"] = [tools[3], tools[0]]
    calls = [replace(call(body), session=f"s{i}") for i, body in enumerate(bodies)]
    assert [f.path for f in lint(calls[:2]) if f.rule == "tool_order"] == []
    assert [f.path for f in lint(calls[1:3]) if f.rule == "tool_order"] == ["tools[1]"]
    assert [f.path for f in lint([calls[0], calls[3]]) if f.rule == "tool_order"] == ["tools[0]"]
    # An agent with other tools, of which one happens to be the same, is another agent.
    other = [{"name": name, "input_schema": {}} for name in ("Ask", "Zip", "Xor")]
    bodies[1]["tools"] = [tools[1], *other, tools[0]]
    assert [f.path for f in lint([calls[0], call(bodies[1])]) if f.rule == "tool_order"] == []


def test_findings_are_counted_and_the_worst_come_first() -> None:
    made = agent("Today is 2026-11-21.")
    made.tools[0]["description"] += " such as 2026-01-31"
    findings = lint([call(made.turn().body(), line) for line in range(1, 6)])
    assert [f.severity for f in findings] == [WARNING, WARNING, INFO]
    assert {f.requests for f in findings} == {5}
    assert findings[0].source == "calls.jsonl:1" and "2026-11-21" in findings[0].message


def test_hostile_requests_take_bounded_time() -> None:
    texts = ["a" * 10_000_000, "0" * 10_000_000, "2026-" * 2_000_000, "nonce" * 2_000_000]
    short = ("now 1:23 ", "10:15 ", "20261121 ", "Sat, Nov ", "1 of may ", "1/1/", "req_a1", "req-")
    short += ("run id=-", "aA0", "0x0", "0:", "_", "/tmp/tmp", "version 2026-11-21 ")
    texts += [text * (200_000 // len(text)) for text in short]
    start = time.thread_time()
    for text in texts:
        lint([call({"model": "m", "system": text, "messages": []})])
    wide: Body = {"model": "m", "messages": [], "tools": [{"x": ["y"] * 500_000}]}
    lint([call(wide)])
    many = [{"name": f"t{i}", "input_schema": {}} for i in range(50_000)]
    lint([call({"model": "m", "messages": [], "tools": many})])
    assert time.thread_time() - start < 20


def run(*args: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_command(parser.add_subparsers())
    parsed = parser.parse_args(["lint", *args])
    return parsed.run(parsed)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "calls.jsonl"
    path.write_text(json.dumps(agent("Today is 2026-11-21.").body()) + "\n")
    assert run(str(path)) == 1
    printed = capsys.readouterr().out
    line = f"{path}:1  CS802 date at system[1]: an absolute date: '2026-11-21'; move it into the"
    assert f"{line} latest message\n" in printed
    assert "1 requests, 2 warnings, 0 notes." in printed
    assert run(str(path), "--json") == 1
    data = json.loads(capsys.readouterr().out)
    assert data["requests"] == 1
    assert {f["rule"] for f in data["findings"]} == {"date", "breakpoint_after_volatile"}
    assert {f["severity"] for f in data["findings"]} == {"warning"}
    path.write_text(json.dumps(agent().body()) + "\n")
    assert run(str(path)) == 0
    path.write_text("{")
    assert run(str(path)) == 2
    assert "calls.jsonl:1: not JSON" in capsys.readouterr().err
    path.write_text('{"hash_ids": [1], "timestamp": 1, "input_length": 5}')
    assert run(str(path)) == 2
    assert "holds hashes of blocks" in capsys.readouterr().err


def test_ignored_markers() -> None:
    """Each by its path and reason; that only the latest count is as clients mean it."""
    block = {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}
    blocks: list[Body] = [{**block, "text": ""}, *[block] * 5]
    body = {"model": "m", "messages": [{"role": "user", "content": blocks}]}
    ask = Call("calls.jsonl:1", None, "s", openai_chat.read(body, TTLS))
    findings = [f for f in lint([ask, ask]) if f.rule == "ignored_marker"]
    at = "messages[0].content"
    assert [(f.path, f.severity, f.requests) for f in findings] == [
        (f"{at}[0].cache_control", WARNING, 2),
        (f"{at}[1].cache_control", INFO, 2),
    ]
    assert "empty" in findings[0].message
    assert "too_many" in findings[1].message


def test_several_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = json.dumps(agent("Today is 2026-11-21.").body()) + "\n"
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    one.write_text(line)
    other.write_text(line.replace("2026-11-21", "2026-11-22"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(line.encode())))
    assert run(str(one), str(other), "-", "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert told["requests"] == 3
    dates = [found["requests"] for found in told["findings"] if found["rule"] == "date"]
    assert sum(dates) == 3


def test_a_file_without_a_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text("\n")
    assert run(str(path)) == 2
    assert f"{path}: holds no request" in capsys.readouterr().err
    assert run(str(path), "--allow-empty") == 0
