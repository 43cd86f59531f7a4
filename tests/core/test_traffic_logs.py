"""The logs that users have, each in the form in which its tool writes it."""

import base64
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest

from vllm_cachescope.cli.traffic import Call, LeftOut, TrafficError, Usage, read_traffic
from vllm_cachescope.prompt.request import Protocol, Region

BODY = {
    "model": "m",
    "max_tokens": 8,
    "system": "Be brief.",
    "messages": [{"role": "user", "content": "Hello"}],
}
CHAT = {"model": "m", "messages": [{"role": "system", "content": "x"}, BODY["messages"][0]]}  # type: ignore[index]
SAID = {"input_tokens": 5, "cache_read_input_tokens": 90, "cache_creation_input_tokens": 5}
USAGE = Usage(100, 90, 5)


def read(path: Path, left_out: list[LeftOut] | None = None) -> list[Call]:
    return [call for call in read_traffic(path, left_out) if isinstance(call, Call)]


def written(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def texts(call: Call) -> list[tuple[str, Region, Any]]:
    return [(part.path, part.region, part.content) for part in call.request.parts]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("as_array", [False, True])
def test_documents_and_arrays(indent: int | None, as_array: bool, tmp_path: Path) -> None:
    path = tmp_path / "calls.json"
    records = [BODY, {"timestamp": 5, "body": CHAT}]
    many = [json.dumps(one, indent=indent) for one in records]
    path.write_text(json.dumps(records, indent=indent) if as_array else "\n".join(many))
    calls = read(path)
    assert [call.request.protocol for call in calls] == [Protocol.MESSAGES, Protocol.CHAT]
    lines = path.read_text().splitlines()
    starts = [int(call.source.rpartition(":")[2].partition("#")[0]) for call in calls]
    assert all(lines[line - 1].lstrip("[ ").startswith("{") for line in starts)


def test_a_document_on_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    document = io.BytesIO(json.dumps([BODY, BODY], indent=2).encode())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(document))
    assert [call.source for call in read(Path("-"))] == ["-:2", "-:13"]


def test_lines_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    path = written(tmp_path / "calls.jsonl", BODY, BODY)
    whole = path.read_text()
    marked = [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}] * 5
    refused = {**BODY, "system": marked}
    bodiless = {"path": "/v1/messages", "timestamp": 7}
    more = [json.dumps(one) + "\n" for one in (refused, bodiless, {"a": 1}, [1])]
    path.write_text("{broken\n" + whole + "".join(more) + json.dumps(BODY)[:-9])
    left_out: list[LeftOut] = []
    assert len(read(path, left_out)) == 2
    said = {one.source.rpartition(":")[2]: one for one in left_out}
    assert list(said) == ["1", "4", "5", "6", "7#1", "8"]
    assert said["4"].refused and "at most 4 breakpoints" in said["4"].reason
    assert "its body was not recorded" in said["5"].reason
    assert "the file ends within it" in said["8"].reason
    with pytest.raises(TrafficError, match=r"calls.jsonl:1: not JSON"):
        read(path)


def test_a_file_that_is_none_of_them_gets_one_error(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("Dear diary,\ntoday it rained.\n")
    with pytest.raises(TrafficError, match=r"notes.txt:1: not JSON.*and 1 more.*expected request"):
        read(path, [])
    with pytest.raises(TrafficError, match=r"not a request.*expected request bodies"):
        read(written(path, {"rows": 3}), [])


def test_converse(tmp_path: Path) -> None:
    point = {"cachePoint": {"type": "default", "ttl": "1h"}}
    use = {"toolUse": {"toolUseId": "t1", "name": "Read", "input": {"a": 1}}}
    result = {"toolResult": {"toolUseId": "t1", "content": [{"text": "found"}]}}
    spec = {"name": "Read", "description": "d", "inputSchema": {"json": {"type": "object"}}}
    body = {
        "modelId": "us.model",
        "system": [{"text": "Be brief."}, point],
        "toolConfig": {"tools": [{"toolSpec": spec}, {"cachePoint": {"type": "default"}}]},
        "messages": [
            {"role": "user", "content": [{"text": "Hello"}]},
            {"role": "assistant", "content": [use]},
            {"role": "user", "content": [result]},
        ],
    }
    (call,) = read(written(tmp_path / "converse.jsonl", body))
    assert call.request.model == "us.model" and not call.request.automatic
    assert texts(call) == [
        (
            "toolConfig.tools[0]",
            Region.TOOLS,
            {"name": "Read", "description": "d", "input_schema": {"type": "object"}},
        ),
        ("system[0]", Region.SYSTEM, {"type": "text", "text": "Be brief."}),
        ("messages[0].content[0]", Region.MESSAGES, {"type": "text", "text": "Hello"}),
        (
            "messages[1].content[0]",
            Region.MESSAGES,
            {"type": "tool_use", "id": "t1", "name": "Read", "input": {"a": 1}},
        ),
        (
            "messages[2].content[0]",
            Region.MESSAGES,
            {
                "type": "tool_result",
                "tool_use_id": "t1",
                "content": [{"type": "text", "text": "found"}],
            },
        ),
    ]
    marks = [part.mark for part in call.request.parts if part.mark]
    assert [(mark.path, mark.ttl_s) for mark in marks] == [
        ("toolConfig.tools[1].cachePoint", None),
        ("system[1].cachePoint", 3600),
    ]
    url = "https://bedrock/model/us.other/converse-stream"
    del body["modelId"]
    (call,) = read(written(tmp_path / "converse.jsonl", {"url": url, "body": body}))
    assert call.request.model == "us.other"


def test_litellm(tmp_path: Path) -> None:
    logged = {
        "id": "chatcmpl-1",
        "trace_id": "t",
        "call_type": "acompletion",
        "startTime": 1772442000.5,
        "model": "m",
        "messages": CHAT["messages"],
        "model_parameters": {"tools": [{"type": "function", "function": {"name": "f"}}]},
        "metadata": {
            "usage_object": {
                "prompt_tokens": 100,
                "prompt_tokens_details": {"cached_tokens": 64},
            }
        },
        "response": {"id": "r1"},
    }
    spend = {
        "call_type": "aanthropic_messages",
        "startTime": "2026-03-02T09:00:00+00:00",
        "session_id": "s",
        "messages": {},
        "proxy_server_request": json.dumps({**BODY, "cache_control": {"type": "ephemeral"}}),
        "response": {"usage": SAID},
    }
    embedding = {**logged, "call_type": "aembedding"}
    one, other = read(written(tmp_path / "litellm.jsonl", embedding, logged, spend))
    assert (other.at, other.session, other.response_id) == (1772442000.5, "t", "r1")
    assert other.request.protocol is Protocol.CHAT and other.usage == Usage(100, 64)
    assert next(part.region for part in other.request.parts) is Region.TOOLS
    assert (one.session, one.usage, one.request.automatic) == ("s", USAGE, False)


def har(posted: str, **content: Any) -> dict[str, Any]:
    return {
        "startedDateTime": "2026-03-02T09:00:00.000Z",
        "request": {
            "method": "POST",
            "url": "https://api/v1/messages",
            "headers": [{"name": "Anthropic-Beta", "value": "b,a"}],
            "postData": {"mimeType": "application/json", "text": posted},
        },
        "response": {"content": content},
    }


def test_http_archives(tmp_path: Path) -> None:
    start = json.dumps({"type": "message_start", "message": {"usage": SAID}})
    stream = f"event: message_start\ndata: {start}\n\ndata: {{}}\n\n"
    packed = base64.b64encode(json.dumps({"usage": SAID}).encode()).decode()
    page = {"request": {"url": "https://api/", "headers": []}, "response": {}}
    entries = [
        page,
        har(json.dumps(BODY), text=stream),
        har(json.dumps(BODY), text=packed, encoding="base64"),
    ]
    path = tmp_path / "traffic.har"
    path.write_text(json.dumps({"log": {"version": "1.2", "entries": entries}}, indent=1))
    calls = read(path)
    assert [call.source for call in calls] == [f"{path}:1#2", f"{path}:1#3"]
    assert [call.usage for call in calls] == [USAGE] * 2
    assert calls[0].extra["anthropic-beta"] == ["a", "b"] and calls[0].at == 1772442000.0


def tnetstring(value: Any) -> bytes:
    if isinstance(value, dict):
        data, kind = b"".join(tnetstring(one) for item in value.items() for one in item), b"}"
    elif isinstance(value, list):
        data, kind = b"".join(map(tnetstring, value)), b"]"
    elif isinstance(value, float):
        data, kind = repr(value).encode(), b"^"
    elif value is None:
        data, kind = b"", b"~"
    elif isinstance(value, str):
        data, kind = value.encode(), b";"
    else:
        data, kind = value, b","
    return b"%d:" % len(data) + data + kind


def test_flows_of_mitmproxy(tmp_path: Path) -> None:
    body, answer = json.dumps(BODY).encode(), json.dumps({"usage": SAID}).encode()
    flow = {
        "websocket": None,
        "request": {
            "headers": [[b"Content-Type", b"application/json"]],
            "content": body,
            "path": b"/v1/messages",
            "timestamp_start": 1772442000.25,
        },
        "response": {"headers": [[b"Content-Encoding", b"gzip"]], "content": gzip.compress(answer)},
    }
    other = {**flow, "request": {**flow["request"], "path": b"/favicon.ico", "content": b""}}  # type: ignore[dict-item]
    path = tmp_path / "flows.mitm"
    path.write_bytes(tnetstring(flow) + tnetstring(other))
    (call,) = read(path)
    assert (call.at, call.usage, call.source) == (1772442000.25, USAGE, f"{path}:1")
    path.write_bytes(tnetstring(flow)[:-40])
    with pytest.raises(TrafficError, match="damaged flow file"):
        read(path)


def spans(*attributes: dict[str, Any]) -> dict[str, Any]:
    def plain(value: Any) -> dict[str, Any]:
        return {"intValue": str(value)} if isinstance(value, int) else {"stringValue": value}

    return {
        "resourceSpans": [
            {
                "scopeSpans": [
                    {
                        "spans": [
                            {
                                "traceId": "t1",
                                "startTimeUnixNano": "1772442000000000000",
                                "attributes": [
                                    {"key": key, "value": plain(value)}
                                    for key, value in one.items()
                                ],
                            }
                            for one in attributes
                        ]
                    }
                ]
            }
        ]
    }


def test_spans_of_the_convention(tmp_path: Path) -> None:
    said = [
        {"role": "user", "parts": [{"type": "text", "content": "Hello"}]},
        {
            "role": "assistant",
            "parts": [{"type": "tool_call", "id": "c", "name": "f", "arguments": {"a": 1}}],
        },
        {"role": "user", "parts": [{"type": "tool_call_response", "id": "c", "response": "ok"}]},
    ]
    span = {
        "gen_ai.request.model": "m",
        "gen_ai.conversation.id": "s",
        "gen_ai.system_instructions": json.dumps([{"type": "text", "content": "Be brief."}]),
        "gen_ai.tool.definitions": json.dumps(
            [{"type": "function", "name": "f", "parameters": {}}]
        ),
        "gen_ai.input.messages": json.dumps(said),
        "gen_ai.usage.input_tokens": 100,
        "gen_ai.usage.cache_read.input_tokens": 90,
    }
    (call,) = read(written(tmp_path / "spans.json", spans({"http.method": "GET"}, span)))
    assert (call.session, call.at, call.usage) == ("s", 1772442000.0, Usage(100, 90))
    assert [content for *_, content in texts(call)] == [
        {"name": "f", "input_schema": {}},
        {"type": "text", "text": "Be brief."},
        {"type": "text", "text": "Hello"},
        {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}},
        {"type": "tool_result", "tool_use_id": "c", "content": "ok"},
    ]


@pytest.mark.parametrize(
    "attributes",
    [
        {"gen_ai.prompt": json.dumps({"messages": CHAT["messages"]})},
        {
            "gen_ai.prompt.0.role": "system",
            "gen_ai.prompt.0.content": "x",
            "gen_ai.prompt.1.role": "user",
            "gen_ai.prompt.1.content": "Hello",
        },
        {
            "llm.input_messages.0.message.role": "system",
            "llm.input_messages.0.message.content": "x",
            "llm.input_messages.1.message.role": "user",
            "llm.input_messages.1.message.content": "Hello",
        },
    ],
)
def test_other_spans(attributes: dict[str, Any], tmp_path: Path) -> None:
    (call,) = read(written(tmp_path / "spans.json", spans(attributes)))
    assert [content for *_, content in texts(call)] == ["x", "Hello"]
    assert call.session == "t1"
    printed = {"name": "chat", "context": {"trace_id": "t2"}, "attributes": attributes}
    (call,) = read(written(tmp_path / "console.json", printed))
    assert call.session == "t2"


def test_session_files_of_claude_code(tmp_path: Path) -> None:
    def line(n: int, kind: str, message: Any, parent: int | None, **more: Any) -> dict[str, Any]:
        return {
            "type": kind,
            "uuid": f"u{n}",
            "parentUuid": None if parent is None else f"u{parent}",
            "sessionId": "s",
            "timestamp": f"2026-03-02T09:0{n}:00Z",
            "message": message,
            **more,
        }

    def answer(name: str, *content: Any, **written: int) -> dict[str, Any]:
        usage = {"input_tokens": 10, "cache_read_input_tokens": 1990} | {"cache_creation": written}
        return {"role": "assistant", "id": name, "model": "m", "content": content, "usage": usage}

    use = {"type": "tool_use", "id": "t", "name": "Read", "input": {}}
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t"}]}
    records = [
        {"type": "summary", "summary": "x", "leafUuid": "u9"},
        line(0, "user", {"role": "user", "content": "Hello"}, None),
        line(1, "assistant", answer("a", {"type": "text", "text": "Hi"}), 0),
        line(2, "assistant", answer("a", use, ephemeral_1h_input_tokens=9), 1),
        {"type": "file-history-snapshot", "messageId": "u2"},
        line(3, "user", result, 2),
        line(4, "system", None, 3),
        line(5, "assistant", answer("b", {"type": "text", "text": "ok"}), 4),
        line(6, "assistant", {"role": "assistant", "model": "<synthetic>", "content": []}, 5),
    ]
    first, second = read(written(tmp_path / "session.jsonl", *records))
    assert (first.response_id, second.response_id) == ("a", "b")
    assert first.usage == Usage(2000, 1990) and second.at == 1772442240.0
    head, *said = second.request.parts
    assert head.region is Region.SYSTEM and len(head.content) == pytest.approx(8000, abs=60)
    assert [part.role for part in said] == ["user", "assistant", "assistant", "user"]
    assert first.request.parts[0].content == head.content


def test_session_files_of_codex(tmp_path: Path) -> None:
    def line(n: int, kind: str, **payload: Any) -> dict[str, Any]:
        return {"timestamp": f"2026-03-02T09:0{n}:00Z", "type": kind, "payload": payload}

    def used(n: int, cached: int) -> dict[str, Any]:
        last = {"input_tokens": 100, "cached_input_tokens": cached, "output_tokens": 5}
        return line(n, "event_msg", type="token_count", info={"last_token_usage": last})

    def message(n: int, role: str, text: str) -> dict[str, Any]:
        content = [{"type": "input_text" if role == "user" else "output_text", "text": text}]
        return line(n, "response_item", type="message", role=role, content=content)

    call = {"call_id": "c", "name": "shell", "arguments": "{}"}
    records = [
        line(0, "session_meta", id="s", instructions="Be brief."),
        line(0, "turn_context", model="m"),
        message(1, "user", "Hello"),
        line(2, "response_item", type="reasoning", summary=[]),
        line(2, "response_item", type="function_call", **call),
        used(2, 0),
        line(3, "response_item", type="function_call_output", call_id="c", output="ok"),
        message(4, "assistant", "Done."),
        used(4, 90),
        line(5, "compacted", message="A summary."),
        message(6, "user", "Go on."),
        message(7, "assistant", "Well."),
    ]
    calls = read(written(tmp_path / "rollout.jsonl", *records))
    assert [call.usage for call in calls] == [Usage(100, 0), Usage(100, 90), None]
    assert [call.session for call in calls] == ["s"] * 3
    said = [[part.path for part in call.request.parts][-1] for call in calls]
    assert said == ["input[0].content[0]", "input[3]", "input[1].content[0]"]
    assert calls[2].at == 1772442360.0
