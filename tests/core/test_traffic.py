import json
from pathlib import Path
from typing import Any

import pytest

from vllm_cachescope.cli.traffic import Call, TrafficError, protocol_of, read_traffic
from vllm_cachescope.config import Config
from vllm_cachescope.durations import format_duration
from vllm_cachescope.prompt.request import Protocol

CHAT, MESSAGES = Protocol.CHAT, Protocol.MESSAGES
HELLO = [{"role": "user", "content": "Hello"}]


def read(tmp_path: Path, *records: dict[str, Any]) -> list[Call]:
    path = tmp_path / "calls.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return [call for call in read_traffic(path) if isinstance(call, Call)]


@pytest.mark.parametrize(
    ("fields", "protocol"),
    [
        *(
            ({name: value}, CHAT)
            for name, value in {
                "response_format": {"type": "json_object"},
                "reasoning_effort": "low",
                "max_completion_tokens": 8,
                "prompt_cache_key": "k",
                "stream_options": {"include_usage": True},
                "functions": [],
                "parallel_tool_calls": True,
                "stop": ["x"],
                "user": "u",
                "seed": 1,
                "n": 1,
            }.items()
        ),
        *(
            ({name: value, "user": "u"}, MESSAGES)
            for name, value in {
                "system": "Be brief.",
                "thinking": {"type": "disabled"},
                "stop_sequences": ["x"],
                "metadata": {"user_id": "u"},
                "cache_control": {"type": "ephemeral"},
                "tools": [{"name": "t", "input_schema": {}}],
            }.items()
        ),
        # Extensions of some servers' Chat.
        ({"thinking": {"type": "disabled"}, "seed": 1, "stop": ["x"]}, CHAT),
        ({"max_tokens": 8, "temperature": 0, "top_p": 1, "stream": True}, MESSAGES),
    ],
)
def test_fields_show_the_format(fields: dict[str, Any], protocol: Protocol) -> None:
    assert protocol_of({"model": "m", "messages": HELLO, **fields}) is protocol


@pytest.mark.parametrize("key", ["path", "url"])
@pytest.mark.parametrize(
    ("path", "protocol"),
    [
        ("/v1/chat/completions", CHAT),
        ("https://gateway/team/v1/chat/completions?beta=true", CHAT),
        ("/chat/completions", CHAT),
        ("/openai/deployments/large/chat/completions?api-version=1", CHAT),
        ("/v1/messages", MESSAGES),
        ("/v1/completions", Protocol.COMPLETIONS),
        ("/gateway/v1/messages", MESSAGES),
        ("/v1/messages/count_tokens", None),
        ("/v1/embeddings", None),
        ("/v1/threads/thread_1/messages", None),
    ],
)
def test_paths_show_the_format(
    key: str, path: str, protocol: Protocol | None, tmp_path: Path
) -> None:
    body = {"model": "m", "messages": HELLO, "input": "Hello"}
    calls = read(tmp_path, {"custom_id": "1", "method": "POST", key: path, "body": body})
    assert [call.request.protocol for call in calls] == ([protocol] if protocol else [])


def test_chat_parameters_are_seen(tmp_path: Path) -> None:
    body = {"model": "m", "messages": HELLO, "reasoning_effort": "low", "prompt_cache_key": "k"}
    (call,) = read(tmp_path, body)
    assert call.request.params == {"reasoning_effort": "low"} and call.session == "k"


def test_ttls_are_those_that_a_server_accepts(tmp_path: Path) -> None:
    def body(ttl: str) -> dict[str, Any]:
        marker = {"type": "ephemeral", "ttl": ttl}
        text = {"type": "text", "text": "Be brief.", "cache_control": marker}
        return {"model": "m", "max_tokens": 8, "system": [text], "messages": HELLO}

    allowed = Config().allowed_ttls
    calls = read(tmp_path, *(body(format_duration(ttl_s)) for ttl_s in allowed))
    marks = [part.mark for call in calls for part in call.request.parts if part.mark]
    assert tuple(mark.ttl_s for mark in marks) == allowed
    with pytest.raises(TrafficError, match="'7m' is not allowed here; allowed: one of 5m, 30m, 1h"):
        read(tmp_path, body("7m"))
