"""What is put right in requests, on a real server: the model is given the repaired prompt and no
other, the reply says so, and the prefix is read."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.engine.bodies import EPHEMERAL, session, text
from tests.engine.engine import BLOCK
from tests.engine.server import MODEL, REPAIRED_KEY, Api, breaks
from tests.engine.usages import counts, last_usage
from vllm_cachescope.prompt.request import Protocol
from vllm_cachescope.repair.repair import RepairKind

pytestmark = pytest.mark.engine

PATHS = {
    Protocol.MESSAGES: "/v1/messages",
    Protocol.CHAT: "/v1/chat/completions",
    Protocol.RESPONSES: "/v1/responses",
}
BY_HAND = "key of one who repairs by hand"
UNREPAIRED = "key of one who repairs nothing"

Body = dict[str, Any]


def schema() -> Body:
    return {
        "type": "object",
        "properties": {"path": {"type": "string"}, "mode": {"type": "string"}},
        "required": ["path", "mode"],
    }


def tool(protocol: Protocol, name: str, seed: str) -> Body:
    about = text(f"{seed} tool {name}", 60)
    if protocol is Protocol.MESSAGES:
        return {"name": name, "description": about, "input_schema": schema()}
    function = {"name": name, "description": about, "parameters": schema()}
    if protocol is Protocol.RESPONSES:
        return {"type": "function", **function}
    return {"type": "function", "function": function}


def schema_of(tool: Body) -> Body:
    function = tool.get("function", tool)
    return function.get("input_schema") or function["parameters"]


def called(protocol: Protocol, arguments: Body) -> list[Body]:
    """Return an earlier tool call with its result."""
    written = json.dumps(arguments)
    if protocol is Protocol.MESSAGES:
        use = {"type": "tool_use", "id": "call_1", "name": "alpha", "input": arguments}
        result = {"type": "tool_result", "tool_use_id": "call_1", "content": "done"}
        return [{"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
    if protocol is Protocol.RESPONSES:
        call = {"type": "function_call", "call_id": "call_1", "name": "alpha"}
        return [
            {**call, "arguments": written},
            {"type": "function_call_output", "call_id": "call_1", "output": "done"},
        ]
    call = {"id": "call_1", "type": "function"}
    return [
        {
            "role": "assistant",
            "tool_calls": [{**call, "function": {"name": "alpha", "arguments": written}}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "done"},
    ]


def request(protocol: Protocol, seed: str) -> Body:
    """Return an agent's request: three tools, a system prompt, a call and a question."""
    given = {
        "model": MODEL,
        "temperature": 0,
        "tools": [tool(protocol, name, seed) for name in ("alpha", "beta", "gamma")],
    }
    turns = [
        {"role": "user", "content": text(f"{seed} begin", 200)},
        *called(protocol, {"path": "a", "mode": "r"}),
        {"role": "user", "content": text(f"{seed} question", 40)},
    ]
    system = text(f"{seed} system", 100)
    if protocol is Protocol.MESSAGES:
        block = {"type": "text", "text": system, "cache_control": EPHEMERAL}
        return {**given, "max_tokens": 8, "system": [block], "messages": turns}
    if protocol is Protocol.RESPONSES:
        return {**given, "max_output_tokens": 8, "instructions": system, "input": turns}
    return {**given, "max_tokens": 8, "messages": [{"role": "system", "content": system}, *turns]}


def turns_of(body: Body) -> list[Body]:
    return body["input"] if "input" in body else body["messages"]


def shuffled(body: Body) -> None:
    body["tools"] = [body["tools"][i] for i in (2, 0, 1)]


def respelled(body: Body) -> None:
    for one in body["tools"]:
        found = schema_of(one)
        for key in ("type", "properties"):
            found[key] = found.pop(key)
        found["required"] = found["required"][::-1]
    for turn in turns_of(body):
        if "arguments" in turn:
            turn["arguments"] = '{"mode":"r","path":"a"}'
        for call in turn.get("tool_calls", ()):
            call["function"]["arguments"] = '{"mode":"r","path":"a"}'
        content = turn.get("content")
        for block in content if isinstance(content, list) else ():
            if block["type"] == "tool_use":
                block["input"] = {"mode": "r", "path": "a"}


def with_defaults(body: Body) -> None:
    for one in body["tools"]:
        schema_of(one)["additionalProperties"] = True


def stamped(value: str) -> Callable[[Body], None]:
    """Return what puts ``value`` at the head of the system prompt."""

    def put(body: Body) -> None:
        if "instructions" in body:
            body["instructions"] = value + body["instructions"]
        elif "system" in body:
            body["system"][0]["text"] = value + body["system"][0]["text"]
        else:
            body["messages"][0]["content"] = value + body["messages"][0]["content"]

    return put


def nothing(body: Body) -> None:
    """Send it as it is."""


def say_at_the_end(said: str) -> Callable[[Body], None]:
    def put(body: Body) -> None:
        last = turns_of(body)[-1]
        kind = "input_text" if "input" in body else "text"
        parts = [last["content"], said]
        last["content"] = [{"type": kind, "text": part} for part in parts]

    return put


@dataclass(frozen=True)
class Case:
    """A kind of repair.

    Attributes:
        kind: the kind.
        first: how the session's first request differs from the plain one.
        second: how its second one does.
        by_hand: how the second one does once it is repaired by hand.
        named: how the change is called that was repaired.
    """

    kind: RepairKind
    first: Callable[[Body], None]
    second: Callable[[Body], None]
    by_hand: Callable[[Body], None]
    named: str


CASES = {
    "order": Case(RepairKind.TOOLS, nothing, shuffled, nothing, "tools_reordered at tools[0]"),
    # The order of `required` is a change to diagnosis.
    "form": Case(RepairKind.JSON, nothing, respelled, nothing, "tool_changed at tools[0]"),
    "field": Case(RepairKind.FIELD, nothing, with_defaults, nothing, "tool_changed at tools[0]"),
    "held": Case(
        RepairKind.HEAD,
        stamped("Nonce: 0a\n"),
        stamped("Nonce: 1b\n"),
        stamped("Nonce: 0a\n"),
        "system_changed",
    ),
    "moved": Case(
        RepairKind.HEAD,
        stamped("Now: Monday\n"),
        stamped("Now: Tuesday\n"),
        say_at_the_end("Now: Tuesday"),
        "system_changed",
    ),
}


def made(protocol: Protocol, edit: Callable[[Body], None], streamed: bool, name: str) -> Body:
    """Return a request, edited, with texts that no other test has."""
    body = request(protocol, name)
    edit(body)
    if protocol is Protocol.CHAT:
        body["return_token_ids"] = True
        if streamed:
            body["stream_options"] = {"include_usage": True}
    return {**body, "stream": True} if streamed else body


@dataclass(frozen=True)
class Answer:
    """An answer: what the model said, the prompt's tokens where they are told, and the usage."""

    said: str
    prompt: list[int] | None
    usage: Body


def asked(api: Api, key: str, protocol: Protocol, body: Body, name: str) -> Answer:
    response = api.post(PATHS[protocol], body, key, **session(name))
    assert response.status_code == 200, response.text
    lines = response.text.splitlines()
    usage = last_usage(lines)
    assert usage is not None
    events = [json.loads(line.removeprefix("data: ")) for line in lines if _is_json(line)]
    prompt = next((e["prompt_token_ids"] for e in events if e.get("prompt_token_ids")), None)
    return Answer("".join(said for event in events for said in _said(event)), prompt, usage)


def _is_json(line: str) -> bool:
    return line.startswith(("{", "data: {"))


def _said(event: Body) -> Iterator[str]:
    """Yield what an answer or an event of one says, of Messages, Chat or Responses."""
    for block in event.get("content") or ():
        yield block.get("text", "")
    delta = event.get("delta")
    if isinstance(delta, str) and event["type"] == "response.output_text.delta":
        yield delta
    if isinstance(delta, dict):
        yield delta.get("text", "")
    for choice in event.get("choices") or ():
        message = choice.get("message") or choice.get("delta") or {}
        yield str(message.get("content") or "") + str(message.get("reasoning") or "")
    for item in event.get("output") or ():
        for block in item.get("content") or ():
            yield block.get("text", "")


@pytest.mark.parametrize("protocol", PATHS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_answer_is_that_of_the_prompt_repaired_by_hand(
    api: Api, case: str, protocol: Protocol
) -> None:
    kind, name = CASES[case], f"repair {case} {protocol}"

    def ask(key: str, edit: Callable[[Body], None], streamed: bool = False) -> Answer:
        return asked(api, key, protocol, made(protocol, edit, streamed, name), name)

    ask(REPAIRED_KEY, kind.first)
    found = ask(REPAIRED_KEY, kind.second)
    streamed = ask(REPAIRED_KEY, kind.second, streamed=True)
    hand = ask(BY_HAND, kind.by_hand)
    ask(UNREPAIRED, kind.first)
    unrepaired = ask(UNREPAIRED, kind.second)

    assert found.said == streamed.said == hand.said != ""
    assert found.prompt == streamed.prompt == hand.prompt
    if found.prompt is not None:
        assert found.prompt != unrepaired.prompt
    assert "prompt_repairs" not in hand.usage
    for answer in (found, streamed):
        assert counts(protocol, answer.usage)[0] == counts(protocol, hand.usage)[0]
        (told,) = answer.usage["prompt_repairs"]
        assert told["kind"] == kind.kind.value
    assert [b for b in breaks(api, REPAIRED_KEY) if b["session"] == name] == []

    # It saved what is read more than without. A tool that changed counts from its beginning.
    (told,) = found.usage["prompt_repairs"]
    assert told["change"].startswith(kind.named), told
    total, read, _ = counts(protocol, found.usage)
    without = counts(protocol, unrepaired.usage)[1]
    assert read >= total / 2
    assert abs(told["saved_tokens"] - (read - without)) <= 3 * BLOCK, (told, read, without)
    # The client stays with what it changed to: that would have been there without a repair, too.
    assert streamed.usage["prompt_repairs"][0]["saved_tokens"] == 0
