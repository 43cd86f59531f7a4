"""The shapes that real clients send, through a tool call and a resumed session.

The words are ours; where fields and markers stand is as `make clients` has recorded it from each
client (docs/clients.md).
"""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from tests.engine.bodies import EPHEMERAL, HOUR, text
from tests.engine.engine import BLOCK
from tests.engine.server import MODEL, Api, breaks

pytestmark = pytest.mark.engine

MARK = {"cache_control": EPHEMERAL}
SCHEMA = {"type": "object", "properties": {"path": {"type": "string"}}}
FILE = '{"path": "tide.txt"}'


@dataclass(frozen=True)
class Shape:
    """A client's requests.

    Attributes:
        path: where they go.
        body: makes one of a name and a turn: 0 asks, 1 brings the tool's result, 2 resumes.
        session: makes the headers of a session's name.
        is_named: whether the client names its session at all.
    """

    path: str
    body: Callable[[str, int], dict[str, Any]]
    session: Callable[[str], dict[str, str]] = lambda name: {}
    is_named: bool = field(default=True)


def weigh(**marks: object) -> dict[str, Any]:
    """Return a tool as Chat has it."""
    function = {"name": "weigh", "description": "Weighs a thing.", "parameters": SCHEMA}
    return {"type": "function", "function": function, **marks}


def tool(**marks: object) -> dict[str, Any]:
    """Return a tool as Messages has it."""
    return {"name": "weigh", "description": "Weighs a thing.", "input_schema": SCHEMA, **marks}


def last_marked(messages: list[dict[str, Any]], mark: object) -> list[dict[str, Any]]:
    messages[-1]["content"][-1]["cache_control"] = mark
    return messages


def message_turns(name: str, turn: int) -> list[dict[str, Any]]:
    use = {"type": "tool_use", "id": "toolu_1", "name": "weigh", "input": {"path": "tide.txt"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": text(f"{name} r", 120)}
    turns = [
        {"role": "user", "content": [{"type": "text", "text": text(f"{name} question", 150)}]},
        {"role": "assistant", "content": [use]},
        {"role": "user", "content": [result]},
        {"role": "assistant", "content": [{"type": "text", "text": text(f"{name} answer", 20)}]},
        {"role": "user", "content": [{"type": "text", "text": text(f"{name} more", 120)}]},
    ]
    return turns[: 2 * turn + 1]


def chat_turns(name: str, turn: int) -> list[dict[str, Any]]:
    call = {"id": "call_1", "type": "function", "function": {"name": "weigh", "arguments": FILE}}
    turns = [
        {"role": "user", "content": text(f"{name} question", 150)},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": text(f"{name} result", 120)},
        {"role": "assistant", "content": text(f"{name} answer", 20)},
        {"role": "user", "content": text(f"{name} more", 120)},
    ]
    return turns[: 2 * turn + 1]


def claude_code(name: str, turn: int) -> dict[str, Any]:
    nonce = f"x-anthropic-billing-header: cc_version=2.1; cch={turn:05x};"
    first, *others = last_marked(message_turns(name, turn), EPHEMERAL)
    reminder = {"type": "text", "text": text(f"{name} reminder", 60)}
    user = {"device_id": "d", "account_uuid": "", "session_id": name}
    return {
        "system": [
            {"type": "text", "text": nonce},
            {"type": "text", "text": "You are an agent.", **MARK},
            {"type": "text", "text": text(f"{name} rules"), **MARK},
        ],
        "tools": [tool()],
        "messages": [
            {**first, "content": [reminder, *first["content"]]},
            {"role": "system", "content": text(f"{name} agents", 150)},
            *others,
        ],
        "metadata": {"user_id": json.dumps(user)},
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
    }


def pydantic_ai(name: str, turn: int) -> dict[str, Any]:
    return {
        "system": [{"type": "text", "text": text(f"{name} rules"), "cache_control": HOUR}],
        "tools": [tool(cache_control=HOUR)],
        "tool_choice": {"type": "auto"},
        "messages": last_marked(message_turns(name, turn), {**EPHEMERAL, "ttl": "5m"}),
        "diagnostics": {"previous_message_id": None},
    }


def langchain(name: str, turn: int) -> dict[str, Any]:
    return {
        "system": [{"type": "text", "text": text(f"{name} rules"), "cache_control": HOUR}],
        "tools": [tool(cache_control=HOUR)],
        "messages": message_turns(name, turn),
        "cache_control": HOUR,
    }


def opencode(name: str, turn: int) -> dict[str, Any]:
    messages = [{"role": "system", "content": text(f"{name} rules"), **MARK}]
    messages += chat_turns(name, turn)
    for message in messages[-2:]:
        for call in message.get("tool_calls", ()):
            call |= MARK
    messages[-1] |= MARK
    return {"messages": messages, "tools": [weigh()], "tool_choice": "auto"}


def openhands(name: str, turn: int) -> dict[str, Any]:
    rules = [
        {"type": "text", "text": text(f"{name} rules"), **MARK},
        {"type": "text", "text": text(f"{name} place", 20)},
    ]
    turns = chat_turns(name, turn)
    parts = [{"type": "text", "text": turns[-1]["content"]}]
    turns[-1]["content"] = parts
    (turns[-1] if turns[-1]["role"] == "tool" else parts[0]).update(MARK)
    return {
        "messages": [{"role": "system", "content": rules}, *turns],
        "tools": [weigh()],
        "reasoning_effort": "high",
        "prompt_cache_key": name,
    }


def ai_sdk(name: str, turn: int) -> dict[str, Any]:
    system = {"role": "system", "content": text(f"{name} rules"), **MARK}
    turns = chat_turns(name, turn)
    turns[-1] |= MARK
    return {"messages": [system, *turns], "tools": [weigh()], "tool_choice": "auto"}


def cline(name: str, turn: int) -> dict[str, Any]:
    system = {"role": "system", "content": text(f"{name} rules")}
    return {
        "messages": [system, *chat_turns(name, turn)],
        "tools": [weigh()],
        "tool_choice": "auto",
    }


def codex(name: str, turn: int) -> dict[str, Any]:
    def message(role: str, words: str, kind: str = "input_text") -> dict[str, Any]:
        content = [{"type": kind, "text": words}]
        return {"type": "message", "role": role, "content": content}

    call = {"type": "function_call", "call_id": "call_1", "name": "weigh", "arguments": FILE}
    output = {"type": "function_call_output", "call_id": "call_1"}
    items = [
        message("user", text(f"{name} question", 150)),
        call,
        {**output, "output": text(f"{name} result", 120)},
        message("assistant", text(f"{name} answer", 20), "output_text"),
        message("user", text(f"{name} more", 120)),
    ]
    rules = [message("developer", text(f"{name} rules")), message("developer", "Be brief.")]
    function = {"type": "function", **weigh()["function"], "strict": False}
    helpers = {"type": "namespace", "name": "helpers", "description": "", "tools": [function]}
    return {
        "input": [*rules, *items[: 2 * turn + 1]],
        "tools": [function, helpers],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"summary": "auto"},
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": name,
        "client_metadata": {"session_id": name, "thread_id": name},
    }


MESSAGES, CHAT, RESPONSES = "/v1/messages", "/v1/chat/completions", "/v1/responses"


def header(name: str) -> Callable[[str], dict[str, str]]:
    return lambda session: {name: session}


SHAPES = {
    "claude-code": Shape(f"{MESSAGES}?beta=true", claude_code, header("X-Claude-Code-Session-Id")),
    "pydantic-ai": Shape(MESSAGES, pydantic_ai, header("X-Session-ID")),
    "langchain": Shape(MESSAGES, langchain, header("X-Session-ID")),
    "opencode": Shape(CHAT, opencode, header("x-session-id")),
    "openhands": Shape(CHAT, openhands),
    "ai-sdk": Shape(CHAT, ai_sdk, header("X-Session-ID")),
    "cline": Shape(CHAT, cline, is_named=False),
    "codex": Shape(RESPONSES, codex),
}


def ask(api: Api, shape: Shape, name: str, body: dict[str, Any]) -> tuple[int, int]:
    """Return the length of the prompt of a streamed request, and how much of it was read."""
    limit = "max_output_tokens" if shape.path == RESPONSES else "max_tokens"
    whole = {"model": MODEL, limit: 2, "stream": True, **body}
    if shape.path == CHAT:
        whole["stream_options"] = {"include_usage": True}
    reply = api.post(shape.path, whole, f"key of {name}", **shape.session(name))
    assert reply.status_code == 200, reply.text
    told: dict[str, Any] = {}
    for line in reply.text.splitlines():
        if line.startswith("data: {"):
            event = json.loads(line.removeprefix("data: "))
            for holder in (event, event.get("message") or {}, event.get("response") or {}):
                told |= holder.get("usage") or {}
    if shape.path.startswith(MESSAGES):
        read, created = told["cache_read_input_tokens"], told["cache_creation_input_tokens"]
        return told["input_tokens"] + read + created, read
    details = told.get("prompt_tokens_details") or told["input_tokens_details"]
    return told.get("prompt_tokens") or told["input_tokens"], details["cached_tokens"]


@pytest.mark.parametrize("client", SHAPES)
def test_a_client_reads_what_it_sent_before(api: Api, client: str) -> None:
    """Through a tool call and a resumed session, and no further than its tools have changed."""
    shape, name = SHAPES[client], f"shape of {client}"
    unexplained = api.metrics("cachescope_unexplained_tokens_total")
    asked = [ask(api, shape, name, shape.body(name, turn)) for turn in range(3)]
    for (earlier, _), (_, read) in itertools.pairwise(asked):
        # Only whole blocks are read, and the start of the answer is not in the next prompt.
        assert earlier - 2 * BLOCK < read <= earlier
    assert breaks(api, f"key of {name}") == []

    changed = shape.body(name, 2)
    described = changed["tools"][0]
    described.get("function", described)["description"] = "Weighs another thing."
    # The template renders tools in front of the question.
    assert ask(api, shape, name, changed)[1] < asked[0][0] - BLOCK
    (seen,) = breaks(api, f"key of {name}")
    assert seen["cause"] == "tools_changed"
    assert seen["session"] == (name if shape.is_named else None)
    assert api.metrics("cachescope_unexplained_tokens_total") == unexplained


def test_pydantic_ai_can_name_its_last_message(api: Api) -> None:
    """It names none whose id does not begin as Anthropic's do."""
    key = "key of the naming"

    def reply(turn: int, **fields: object) -> httpx.Response:
        body = pydantic_ai("naming", turn) | {"model": MODEL, "max_tokens": 2} | fields
        answer = api.post(MESSAGES, body, key)
        return answer.raise_for_status()

    first = reply(0).json()
    assert first["id"].startswith("msg_")
    diagnostics = {"previous_message_id": first["id"]}
    changed = reply(1, diagnostics=diagnostics, system="Be brief.").json()["diagnostics"]
    assert changed["cache_miss_reason"]["type"] == "system_changed"
    assert reply(1, diagnostics=diagnostics).json()["diagnostics"] is None
