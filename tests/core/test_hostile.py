"""Bodies that mean harm cost bounded time and memory, all the way through the middleware."""

import asyncio
import gc
import json
import sys
import time
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from starlette.types import Message, Receive, Scope, Send

from tests.core.reach import reachable
from vllm_cachescope.api.engines import Engines, Purged
from vllm_cachescope.api.middleware import CacheScopeMiddleware
from vllm_cachescope.api.request_context import PromptTiming, current_request
from vllm_cachescope.api.services import Server
from vllm_cachescope.cache.report import EngineId, Report, Row
from vllm_cachescope.config import load
from vllm_cachescope.tenancy.scope import Scope as CacheScope


class Nothing(Engines):
    """No engines: what they would do to a body is not what is asked here."""

    async def health(self) -> list[list[dict[str, Any]]]:
        return []

    async def purge(self, prefix: bytes) -> Purged:
        return Purged()


TOKEN = "the operator of the tests"


class Middleware(CacheScopeMiddleware):
    def connect(self, state: Any) -> Server:
        config = load({"secret": "a secret of the tests", "operator_token": TOKEN})
        return Server(config, 16, (), Nothing(), CollectorRegistry())


class State:
    state = None


async def server(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer whatever it is, as a server does that has read it and run it."""
    while (await receive()).get("more_body"):
        pass
    context = current_request.get()
    if context is not None:
        rows = (Row("created", CacheScope.ORG, 300, 160),)
        context.reports["nonce"] = Report(rows, engine=EngineId(0, "epoch"))
        context.timings["nonce"] = PromptTiming(range(160), 160, 160, 0.0, 0.0)
    body = json.dumps({"id": "msg_1", "usage": {"input_tokens": 160, "prompt_tokens": 160}})
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body.encode()})


@pytest.fixture
def middleware() -> Middleware:
    return Middleware(server)


def post(middleware: Middleware, path: str, body: bytes, **headers: bytes) -> int:
    """Post a body; return the status of the one answer to it."""
    return answer_to(middleware, path, body, **headers)[0]


def answer_to(
    middleware: Middleware, path: str, body: bytes, **headers: bytes
) -> tuple[int, bytes]:
    """Post a body; return the status and the body of the one answer to it."""
    sent: list[Message] = []
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "headers": [(name.encode(), value) for name, value in headers.items()],
        "app": State(),
    }

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(middleware(scope, receive, send))
    (start,) = (message for message in sent if message["type"] == "http.response.start")
    assert sent[-1]["type"] == "http.response.body"
    return int(start["status"]), sent[-1]["body"]


BIG = "x" * 10_000_000
MESSAGES = [{"role": "user", "content": "hello"}]


def said(**fields: object) -> bytes:
    return json.dumps({"model": "m", "messages": MESSAGES, "input": "hello", **fields}).encode()


def nested(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


def tools(count: int, **fields: object) -> list[dict[str, object]]:
    return [
        {"name": f"tool{i}", "input_schema": {"type": "object"}, **fields} for i in range(count)
    ]


MARK = {"cache_control": {"type": "ephemeral"}}
BODIES = {
    "100,000 tools": said(tools=tools(100_000)),
    "100,000 breakpoints": said(tools=tools(100_000, **MARK)),
    "100,000 messages": said(messages=MESSAGES * 100_000, input=MESSAGES * 100_000),
    "100,000 blocks": said(
        system=[{"type": "text", "text": str(i)} for i in range(100_000)],
        instructions="hello " * 100_000,
    ),
    "10 MB message": said(messages=[{"role": "user", "content": BIG}], input=BIG),
    "10 MB system": said(system=BIG, instructions=BIG),
    "10 MB names": said(
        model=BIG, tools=[{"name": BIG}], metadata={"user_id": BIG}, prompt_cache_key=BIG
    ),
    "10 MB id": said(
        diagnostics={"previous_message_id": BIG},
        prompt_cache_options={"comparison_response_id": BIG},
        previous_response_id=BIG,
    ),
    "300,000 fields": said(**{f"field{i}": i for i in range(300_000)}),
    "300,000 parameters": said(chat_template_kwargs={f"key{i}": i for i in range(300_000)}),
    "nested, 200,000 deep": b'{"model":"m","messages":' + nested(200_000) + b"}",
    "nested, 900 deep": b'{"model":"m","tools":[' + nested(900) + b'],"messages":[]}',
    "nested, 100 deep": b'{"model":"m","tools":[' + nested(100) + b'],"messages":[]}',
    "invalid UTF-8": b'{"model":"m","messages":[{"role":"user","content":"\xff\xfe\x00"}]}',
    "half a surrogate pair": said(system="\ud800", instructions="\udfff", user="\ud800"),
    "numbers": b'{"model":1e999,"messages":[NaN,-Infinity,1e999],"max_tokens":'
    + b"9" * 4000
    + b"}",
    "no object": b"[" + b"1," * 1_000_000 + b"1]",
    "no JSON": b"\x00" * 10_000_000,
    "wrong types": b'{"model":{},"messages":{"a":[]},"tools":7,"system":[[[]]],"metadata":[]}',
}
PATHS = ("/v1/messages", "/v1/chat/completions", "/v1/responses")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", BODIES)
def test_hostile_bodies(middleware: Middleware, path: str, name: str) -> None:
    post(middleware, path, said())
    before, start = kept_bytes(middleware), time.thread_time()
    for session in (b"one", b"other"):
        status = post(middleware, path, BODIES[name], **{"x-cachescope-session": session})
        assert status in (200, 400)
    # About as long as reading the body took; two minutes would be an attack.
    assert time.thread_time() - start < 30
    assert kept_bytes(middleware) - before < 2_000_000
    assert post(middleware, path, said()) == 200


def test_many_sessions_with_long_names(middleware: Middleware) -> None:
    """What a session is called is kept, too."""
    post(middleware, PATHS[0], said())
    before = kept_bytes(middleware)
    for i in range(100):
        name = "n" * 100_000 + f"{i}"
        post(middleware, PATHS[0], said(metadata={"user_id": json.dumps({"session_id": name})}))
        post(middleware, PATHS[1], said(prompt_cache_key=name))
        post(middleware, PATHS[2], said(), **{"x-session-id": name.encode()})
    assert kept_bytes(middleware) - before < 2_000_000
    # They are different sessions all the same.
    purged = [purge(middleware, session="n" * 100_000 + f"{i}") for i in range(100)]
    assert min(purged) > 0 and purge(middleware, all=True) > 0


def purge(middleware: Middleware, **what: object) -> int:
    """Purge; return how many requests were known of it."""
    body = json.dumps(what).encode()
    headers = {"x-api-key": TOKEN.encode()}
    status, answer = answer_to(middleware, "/cachescope/purge", body, **headers)
    assert status == 200
    return int(json.loads(answer)["fingerprints"])


def kept_bytes(root: object) -> int:
    gc.collect()
    return sum(map(sys.getsizeof, reachable(root)))
