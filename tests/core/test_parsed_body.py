"""A large body reaches a Starlette server as the object it was read into, and as nothing else."""

import json
from typing import Any

import pytest
from fastapi import FastAPI
from pydantic import BaseModel
from starlette.requests import Request
from starlette.types import Receive, Scope

from vllm_cachescope.api.http_request import read_body
from vllm_cachescope.api.incoming_body import LARGE_BYTES, IncomingBody, read_incoming
from vllm_cachescope.api.parsed_body import hand_over, install
from vllm_cachescope.config import load
from vllm_cachescope.prompt.request import Protocol

CONFIG = load({"secret": "a secret of the tests"})
MARKER = {"type": "ephemeral"}


class Body(BaseModel):
    model: str
    messages: list[Any]


def body(**fields: Any) -> dict[str, Any]:
    text = {"type": "text", "text": "x" * LARGE_BYTES, "cache_control": MARKER}
    return {"model": "m", "messages": [{"role": "user", "content": [text]}], **fields}


def bare(**fields: Any) -> dict[str, Any]:
    """`body` as the server gets it."""
    expected = body(**fields)
    del expected["messages"][0]["content"][0]["cache_control"]
    return expected


def request(raw: bytes) -> tuple[Scope, Receive]:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": raw, "more_body": False}

    return {"type": "http", "headers": []}, receive


async def handed(raw: bytes) -> tuple[IncomingBody, Scope, Receive]:
    """What the server gets of a body."""
    install()
    scope, receive = request(raw)
    sent, replayed = await read_body(scope, receive)
    incoming = await read_incoming(sent, Protocol.MESSAGES, CONFIG, takes_parsed=True)
    assert incoming is not None and incoming.parsed is not None and incoming.raw is None
    return incoming, hand_over(scope, incoming.parsed), replayed


async def test_the_server_parses_nothing_and_gets_no_marker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    incoming, scope, replayed = await handed(json.dumps(body(max_tokens=0)).encode())
    parsed = []
    monkeypatch.setattr(json, "loads", lambda *args: parsed.append(args))
    server = Request(scope, replayed)
    got = await server.json()
    assert got == bare(max_tokens=1, stream=False)
    assert got is await server.json() and not parsed
    # What the server changes changes nothing here.
    got["messages"][0]["content"].clear()
    assert incoming.forwarded == bare(max_tokens=1, stream=False)


async def test_what_another_middleware_changed_is_what_the_server_gets() -> None:
    _, scope, _ = await handed(json.dumps(body()).encode())
    changed = json.dumps(body(temperature=0)).encode()
    assert await Request(scope, request(changed)[1]).json() == bare(temperature=0)
    _, scope, _ = await handed(json.dumps(body()).encode())
    with pytest.raises(json.JSONDecodeError):
        await Request(scope, request(b"no JSON")[1]).json()


async def test_other_requests_are_parsed_as_ever() -> None:
    install()
    install()
    assert await Request(*request(b'{"a": 1}')).json() == {"a": 1}
    small = json.dumps({"model": "m", "messages": []}).encode()
    incoming = await read_incoming(small, Protocol.MESSAGES, CONFIG, takes_parsed=True)
    assert incoming is not None and incoming.parsed is None


async def test_nothing_is_kept_of_what_the_server_has() -> None:
    raw = json.dumps(body()).encode()
    incoming, scope, replayed = await handed(raw)
    assert incoming.parsed is not None
    got = await Request(scope, replayed).json()
    again = incoming.parsed.take(raw)
    assert again == got and again is not got


async def test_a_body_too_deep_to_copy_goes_on_as_json() -> None:
    deep = "[" * 900 + "]" * 900
    raw = f'{{"model": "m", "messages": [], "x": {deep}, "y": "{"x" * LARGE_BYTES}"}}'.encode()
    incoming = await read_incoming(raw, Protocol.CHAT, CONFIG, takes_parsed=True)
    assert incoming is None or incoming.parsed is None or incoming.parsed.take(raw)["x"]


async def test_a_server_as_vllms_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    app, taken = FastAPI(), []

    @app.post("/v1/messages")
    async def create(request: Body) -> None:
        taken.append(request)

    raw = json.dumps(body()).encode()
    _, scope, replayed = await handed(raw)
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(raw))]
    fields = {"method": "POST", "path": "/v1/messages", "query_string": b"", "headers": headers}
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    monkeypatch.setattr(json, "loads", None)
    await app({**scope, **fields}, replayed, send)
    assert sent[0]["status"] == 200
    assert [one.model_dump() for one in taken] == [bare()]
