"""Bodies that mean harm cost bounded time and memory, all the way through the middleware."""

import asyncio
import gc
import json
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from starlette.types import Message, Receive, Scope, Send

from tests.core.reach import reachable
from vllm_cachescope.api.diagnoser import Diagnoser
from vllm_cachescope.api.engines import Engines, Purged
from vllm_cachescope.api.incoming_body import LARGE_BYTES
from vllm_cachescope.api.middleware import CacheScopeMiddleware
from vllm_cachescope.api.request_context import PromptTiming, current_request
from vllm_cachescope.api.services import Server
from vllm_cachescope.cache.report import EngineId, Report, Row
from vllm_cachescope.config import load
from vllm_cachescope.prompt.request import Protocol
from vllm_cachescope.tenancy.scope import Scope as CacheScope
from vllm_cachescope.wire import READERS


class Nothing(Engines):
    """No engines: what they would do to a body is not what is asked here."""

    async def health(self) -> list[list[dict[str, Any]]]:
        return []

    async def end_session(self, owners) -> int:
        return 0

    async def purge(
        self, prefix: bytes, org: str | None = None, session: str | None = None
    ) -> Purged:
        return Purged()


TOKEN = "the operator of the tests"


class Middleware(CacheScopeMiddleware):
    def connect(self, state: Any) -> Server:
        config = load({"secret": "a secret of the tests", "operator_token": TOKEN})
        return Server(config, "m", 16, (), Nothing(), lambda *_: None, CollectorRegistry())


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
    return asyncio.run(answering(middleware, "POST", path, body, **headers))


async def answering(
    middleware: Middleware, method: str, path: str, body: bytes, **headers: bytes
) -> tuple[int, bytes]:
    """Send a request; return the status and the body of the one answer to it."""
    sent: list[Message] = []
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [(name.encode(), value) for name, value in headers.items()],
        "app": State(),
    }

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    await middleware(scope, receive, send)
    (start,) = (message for message in sent if message["type"] == "http.response.start")
    assert sent[-1]["type"] == "http.response.body"
    return int(start["status"]), sent[-1]["body"]


MESSAGES = [{"role": "user", "content": "hello"}]


def said(**fields: object) -> bytes:
    return json.dumps({"model": "m", "messages": MESSAGES, "input": "hello", **fields}).encode()


def long(count: int) -> str:
    return "x" * (100 * count)


def nested(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


def tools(count: int, **fields: object) -> list[dict[str, object]]:
    return [
        {"name": f"tool{i}", "input_schema": {"type": "object"}, **fields} for i in range(count)
    ]


MARK = {"cache_control": {"type": "ephemeral"}}
BODIES: dict[str, Callable[[int], bytes]] = {
    "many tools": lambda count: said(tools=tools(count)),
    "many breakpoints": lambda count: said(tools=tools(count, **MARK)),
    "many messages": lambda count: said(messages=MESSAGES * count, input=MESSAGES * count),
    "many blocks": lambda count: said(
        system=[{"type": "text", "text": str(i)} for i in range(count)],
        instructions="hello " * count,
    ),
    "a long message": lambda count: said(
        messages=[{"role": "user", "content": long(count)}], input=long(count)
    ),
    "a long system prompt": lambda count: said(system=long(count), instructions=long(count)),
    "long names": lambda count: said(
        model=long(count),
        tools=[{"name": long(count)}],
        metadata={"user_id": long(count)},
        prompt_cache_key=long(count),
    ),
    "a long id": lambda count: said(
        diagnostics={"previous_message_id": long(count)},
        prompt_cache_options={"comparison_response_id": long(count)},
        previous_response_id=long(count),
    ),
    "many fields": lambda count: said(**{f"field{i}": i for i in range(3 * count)}),
    "many parameters": lambda count: said(
        chat_template_kwargs={f"key{i}": i for i in range(3 * count)}
    ),
    "nested deeply": lambda count: b'{"model":"m","messages":' + nested(2 * count) + b"}",
    "no object": lambda count: b"[" + b"1," * 10 * count + b"1]",
    "no JSON": lambda count: b"\x00" * 100 * count,
}
"""Each for a count of 100,000."""

SMALL_BODIES = {
    "nested, 900 deep": b'{"model":"m","tools":[' + nested(900) + b'],"messages":[]}',
    "nested, 100 deep": b'{"model":"m","tools":[' + nested(100) + b'],"messages":[]}',
    "invalid UTF-8": b'{"model":"m","messages":[{"role":"user","content":"\xff\xfe\x00"}]}',
    "half a surrogate pair": said(system="\ud800", instructions="\udfff", user="\ud800"),
    "numbers": b'{"model":1e999,"messages":[NaN,-Infinity,1e999],"max_tokens":'
    + b"9" * 4000
    + b"}",
    "wrong types": b'{"model":{},"messages":{"a":[]},"tools":7,"system":[[[]]],"metadata":[]}',
}
PATHS = ("/v1/messages", "/v1/chat/completions", "/v1/responses")
COUNTS = [
    (PATHS[0], 100_000),
    # A tenth there, where most of the way is the same.
    *((path, 10_000) for path in PATHS[1:]),
    *(pytest.param(path, 100_000, marks=pytest.mark.slow) for path in PATHS[1:]),
]


@pytest.mark.parametrize(("path", "count"), COUNTS)
@pytest.mark.parametrize("name", BODIES)
def test_hostile_bodies(middleware: Middleware, path: str, name: str, count: int) -> None:
    # Of 100,000, about as long as reading the body took; two minutes would be an attack.
    survives(middleware, path, BODIES[name](count), 30 * count / 100_000)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", SMALL_BODIES)
def test_small_hostile_bodies(middleware: Middleware, path: str, name: str) -> None:
    survives(middleware, path, SMALL_BODIES[name], 30)


def survives(middleware: Middleware, path: str, body: bytes, seconds: float) -> None:
    """Assert that ``body`` is answered in so many seconds of CPU time, and leaves little behind."""
    post(middleware, path, said())
    before, start = kept_bytes(middleware), time.process_time()
    for session in (b"one", b"other"):
        status = post(middleware, path, body, **{"x-cachescope-session": session})
        assert status in (200, 400)
    assert time.process_time() - start < seconds
    assert kept_bytes(middleware) - before < 2_000_000
    assert post(middleware, path, said()) == 200


@pytest.mark.parametrize("diagnosed", [True, False])
def test_a_large_body_is_worked_on_off_the_event_loop(
    middleware: Middleware, monkeypatch: pytest.MonkeyPatch, diagnosed: bool
) -> None:
    """The streams of others go on meanwhile."""
    worked: dict[str, int] = {}
    read, fingerprint = READERS[Protocol.MESSAGES], Diagnoser.fingerprint

    def reading(*args: Any) -> Any:
        worked["read"] = threading.get_ident()
        return read(*args)

    def fingerprinting(*args: Any) -> Any:
        worked["fingerprint"] = threading.get_ident()
        return fingerprint(*args)

    monkeypatch.setitem(READERS, Protocol.MESSAGES, reading)
    monkeypatch.setattr(Diagnoser, "fingerprint", fingerprinting)
    wish = {"diagnostics": {"previous_message_id": None}} if diagnosed else {}

    async def breaks() -> list[Any]:
        operator = f"Bearer {TOKEN}".encode()
        path = "/cachescope/breaks"
        _, answer = await answering(middleware, "GET", path, b"", authorization=operator)
        return json.loads(answer)["breaks"]

    async def session() -> None:
        messages = [{"role": "user", "content": "x" * LARGE_BYTES}]
        for model in ("one", "other"):
            body = said(model=model, messages=messages, **wish)
            await answering(middleware, "POST", PATHS[0], body)
        # The second one was diagnosed after the first, whoever had its fingerprint first.
        while not (seen := await breaks()):
            await asyncio.sleep(0.01)
        assert [(b["kind"], b["model"]) for b in seen] == [("model_changed", "other")]

    asyncio.run(asyncio.wait_for(session(), 60))
    here = threading.get_ident()
    assert worked.keys() == {"read", "fingerprint"} and here not in worked.values()
    post(middleware, PATHS[0], said())
    assert set(worked.values()) == {here}


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
