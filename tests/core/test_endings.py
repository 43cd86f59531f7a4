"""How answers ended, as replies say it, and how engines hear of it."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from starlette.types import Message, Receive, Scope, Send

from tests.core.test_middleware import Application, Nothing
from vllm_cachescope.api import endings
from vllm_cachescope.api.endings import MAX_WAITING, Endings, ending_of
from vllm_cachescope.api.middleware import CacheScopeMiddleware
from vllm_cachescope.api.request_context import current_request
from vllm_cachescope.api.services import Server
from vllm_cachescope.cache.runs import Ended
from vllm_cachescope.config import load
from vllm_cachescope.tenancy.owner_tags import OwnerTags
from vllm_cachescope.tenancy.scope import Caller


def chat(*reasons: str | None, **message: Any) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "choices": [{"message": message, "finish_reason": reason} for reason in reasons],
    }


@pytest.mark.parametrize(
    ("reply", "ended"),
    [
        (chat("tool_calls"), Ended.TOOLS),
        (chat("stop"), Ended.ANSWER),
        (chat("stop", "tool_calls"), Ended.TOOLS),
        (chat("length"), None),
        (chat(None), None),
        (chat(None, content='"finish_reason": "tool_calls"'), None),
        (chat("stop", content='{"stop_reason":"tool_use"}'), Ended.ANSWER),
        ({"type": "message", "stop_reason": "tool_use"}, Ended.TOOLS),
        ({"type": "message_delta", "delta": {"stop_reason": "end_turn"}}, Ended.ANSWER),
        ({"type": "message", "stop_reason": "max_tokens"}, None),
        ({}, None),
    ],
)
@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
def test_a_reply_says_how_the_answer_ended_and_its_text_does_not(reply, ended, separators) -> None:
    assert ending_of(json.dumps(reply, separators=separators).encode()) is ended


@pytest.mark.parametrize(
    ("reply", "ended"),
    [
        ({"status": "completed", "output": [{"type": "function_call"}]}, Ended.TOOLS),
        ({"status": "completed", "output": [{"type": "message"}]}, Ended.ANSWER),
        ({"status": "incomplete", "output": [{"type": "message"}]}, None),
        ({"type": "response.output_item.done", "item": {"status": "completed"}}, None),
    ],
)
def test_responses_end_with_their_output(reply, ended) -> None:
    assert ending_of(json.dumps(reply).encode(), is_responses=True) is ended


async def test_engines_hear_of_several_at_once_and_of_no_more_than_fit(monkeypatch) -> None:
    monkeypatch.setattr(endings, "TOLD_EVERY_S", 0.0)
    told: list[list[tuple[str, int]]] = []

    async def tell(notes: list[tuple[str, int]]) -> None:
        told.append(notes)
        if len(told) == 1:
            raise TimeoutError

    over: list[bytes] = []

    async def tell_over(owners: Sequence[bytes]) -> None:
        over.extend(owners)

    tags = OwnerTags(b"a secret of the tests")
    waiting = Endings(tell, tell_over, tags)
    waiting.note(["a"], Ended.ANSWER)
    waiting.note(["b", "c"], Ended.TOOLS)
    await asyncio.sleep(0.01)
    assert told == [[("a", 0), ("b", 1), ("c", 1)]]
    # An engine that does not answer costs what it was told, and nothing else.
    for number in range(MAX_WAITING + 5):
        waiting.note([str(number)], Ended.ANSWER)
    await asyncio.sleep(0.01)
    assert [len(notes) for notes in told] == [3, MAX_WAITING]
    waiting.end_session(Caller("acme", None))
    waiting.end_session(Caller("acme", "s"))
    waiting.end_session(Caller("acme", "s"))
    await asyncio.sleep(0.01)
    assert over == [tags.of(Caller("acme", "s"))]
    assert len(told) == 2


class Hearing(Nothing):
    def __init__(self) -> None:
        self.heard: list[tuple[str, int]] = []

    async def tell_endings(self, endings: list[tuple[str, int]]) -> None:
        self.heard += endings


@pytest.mark.parametrize("policy", ["learned", "lifetime"])
@pytest.mark.parametrize("streamed", [False, True])
async def test_engines_are_told_of_a_request_that_waits_for_a_tool(
    monkeypatch, policy: str, streamed: bool
) -> None:
    monkeypatch.setattr(endings, "TOLD_EVERY_S", 0.0)
    engines = Hearing()

    async def server(scope: Scope, receive: Receive, send: Send) -> None:
        context = current_request.get()
        assert context is not None
        context.plans["the nonce"] = None  # type: ignore[assignment]
        body = json.dumps({"id": "1", "stop_reason": "tool_use"}).encode()
        kind, body = (
            (b"text/event-stream", b"event: message_delta\ndata: " + body + b"\n\n")
            if streamed
            else (b"application/json", body)
        )
        headers = [(b"content-type", kind)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    class Connected(CacheScopeMiddleware):
        def connect(self, state: Any) -> Server:
            config = load({"secret": "a secret of the tests", "eviction": {"policy": policy}})
            return Server(config, "m", 16, (), engines, lambda *_: None, CollectorRegistry())

    asked = {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": "Hello"}]}

    async def receive() -> Message:
        return {"type": "http.request", "body": json.dumps(asked).encode(), "more_body": False}

    async def send(message: Message) -> None:
        pass

    scope = {"type": "http", "headers": [], "app": Application(), "query_string": b""}
    await Connected(server)(scope | {"method": "POST", "path": "/v1/messages"}, receive, send)
    await asyncio.sleep(0.01)
    assert engines.heard == ([("the nonce", Ended.TOOLS)] if policy == "learned" else [])


@pytest.mark.parametrize(
    ("body", "headers", "status", "ended"),
    [
        ({"session_id": "s", "session_over": True}, {}, 200, ["s"]),
        ({"session_id": "s"}, {"x-cachescope-session-over": "true"}, 200, ["s"]),
        ({"session_id": "s", "session_over": False}, {}, 200, []),
        ({"session_over": True}, {}, 400, []),
        ({}, {"x-cachescope-session-over": "true"}, 400, []),
        ({"session_id": "s"}, {"x-cachescope-session-over": "yes"}, 400, []),
    ],
)
async def test_engines_are_told_of_a_session_that_is_over_after_its_last_reply(
    monkeypatch, body: dict[str, Any], headers: dict[str, str], status: int, ended: list[str]
) -> None:
    monkeypatch.setattr(endings, "TOLD_EVERY_S", 0.0)
    over: list[bytes] = []
    sent: list[Message] = []

    class Told(Nothing):
        async def end_session(self, owners: Sequence[bytes]) -> int:
            assert sent, "the reply comes first"
            over.extend(owners)
            return 0

    async def server(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    class Connected(CacheScopeMiddleware):
        def connect(self, state: Any) -> Server:
            config = load({"secret": "a secret of the tests"})
            return Server(config, "m", 16, (), Told(), lambda *_: None, CollectorRegistry())

    asked = {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": "Hello"}]}

    async def receive() -> Message:
        return {"type": "http.request", "body": json.dumps(asked | body).encode()}

    async def send(message: Message) -> None:
        sent.append(message)

    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "headers": raw, "app": Application(), "query_string": b""}
    await Connected(server)(scope | {"method": "POST", "path": "/v1/messages"}, receive, send)
    await asyncio.sleep(0.01)
    assert sent[0]["status"] == status
    if status == 400:
        assert b"session" in sent[1]["body"]
    tags = OwnerTags(b"a secret of the tests")
    assert over == [tags.of(Caller("anonymous", session)) for session in ended]
