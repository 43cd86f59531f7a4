"""Requests of sessions that move, through the whole API side: what replies tell of them, and that
no reply waits for a Redis. The engines' part is made up; `test_moves` has real ones."""

import asyncio
import json
import random
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from starlette.types import Message, Receive, Scope, Send

from tests.engine.bodies import agent_body
from tests.redis.servers import RedisServer
from vllm_cachescope.api.engines import Engines, Purged
from vllm_cachescope.api.middleware import CacheScopeMiddleware
from vllm_cachescope.api.request_context import PromptTiming, current_request
from vllm_cachescope.api.services import Server
from vllm_cachescope.api.session_exchange import READ_S
from vllm_cachescope.cache.report import EngineId, Report, Row
from vllm_cachescope.config import load
from vllm_cachescope.connectors import redis
from vllm_cachescope.metrics import SESSION_NOTES
from vllm_cachescope.tenancy import scope as scopes
from vllm_cachescope.tiers.keyspace import secret_digest

SECRET = "a secret of the tests of moved requests"
TOKENS = 1200


class Nothing(Engines):
    """Engines that nothing is asked of."""

    async def health(self) -> list[list[dict[str, Any]]]:
        return []

    async def purge(
        self, prefix: bytes, org: str | None = None, session: str | None = None
    ) -> Purged:
        return Purged()

    async def end_session(self, owners: Sequence[bytes]) -> int:
        return 0


class Replica(CacheScopeMiddleware):
    """A server whose engine computes everything, in ``takes_s`` seconds."""

    state = None

    def __init__(self, url: str, name: str, takes_s: float = 0.05) -> None:
        super().__init__(self._serve)
        self.name, self._url, self._takes_s = name, url, takes_s
        self.registry = CollectorRegistry()
        self._answers = 0
        self.handler = self.connected({"app": self})  # type: ignore[arg-type]

    def connect(self, state: Any) -> Server:
        make = redis.note_stores(self._url, 0.5, secret_digest(SECRET.encode()), time.monotonic)
        return Server(
            load({"secret": SECRET}),
            "m",
            16,
            (),
            Nothing(),
            lambda *_: None,
            self.registry,
            replica=self.name,
            note_stores=make,
        )

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = json.loads((await receive())["body"])
        context = current_request.get()
        assert context is not None
        began = time.monotonic()
        await asyncio.sleep(self._takes_s)
        # The tools stand first in a prompt: with others all tokens are.
        tokens = random.Random(json.dumps(body["tools"])).choices(range(1000), k=TOKENS)
        rows = (Row("created", scopes.Scope.ORG, 300, TOKENS),)
        context.reports["n"] = Report(rows, engine=EngineId(0, self.name, "h", ("redis",)))
        context.timings["n"] = PromptTiming(tokens, TOKENS, TOKENS, began, began)
        self._answers += 1
        reply = {"id": f"{self.name}{self._answers}", "usage": {"input_tokens": TOKENS}}
        if body.get("stream"):
            first = {"type": "message_start", "message": reply}
            last = {"type": "message_delta", "usage": {"output_tokens": 1}}
            events = [f"event: x\ndata: {json.dumps(event)}\n\n" for event in (first, last)]
            kind, data = "text/event-stream", "".join(events).encode()
        else:
            kind, data = "application/json", json.dumps(reply).encode()
        headers = [(b"content-type", kind.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": data})

    async def post(self, body: dict[str, Any], session: str = "s") -> tuple[str, float]:
        """Send a request; return the reply's body, and how long it took."""
        sent: list[bytes] = []

        async def receive() -> Message:
            return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

        async def send(message: Message) -> None:
            sent.append(message.get("body", b""))

        headers = [(b"x-api-key", b"key"), (b"x-cachescope-session", session.encode())]
        scope = {"type": "http", "method": "POST", "path": "/v1/messages", "headers": headers}
        began = time.monotonic()
        await self(scope | {"app": self, "query_string": b""}, receive, send)
        return b"".join(sent).decode(), time.monotonic() - began

    async def noted(self, notes: int) -> None:
        """Wait until so many notes are written."""
        labels = {"model_name": "m", "engine": "none", "outcome": "written"}
        name = SESSION_NOTES.shown
        while (self.registry.get_sample_value(name, labels) or 0) < notes:
            await asyncio.sleep(0.005)

    async def causes(self, count: int) -> list[str]:
        """Return the causes of the breaks, the newest first, once there are so many."""
        breaks = self.handler.services.diagnoser.breaks
        while len(found := breaks.recent(None)) < count:
            await asyncio.sleep(0.005)
        return [one.diagnosis.cause for one in found]


def asking(name: str, previous: str | None, **fields: Any) -> dict[str, Any]:
    return agent_body(name, **fields, diagnostics={"previous_message_id": previous})


@pytest.mark.parametrize("stream", [False, True])
async def test_a_reply_tells_what_changed_since_another_server(server, stream):
    a, b = Replica(server.url, "a"), Replica(server.url, "b")
    await a.post(asking("x", None))
    await a.noted(1)
    body = asking("x", "msg_a1", tool="Weighs anything.") | {"stream": stream}
    reply, _ = await b.post(body)
    assert '"tools_changed"' in reply
    assert await b.causes(1) == ["tools_changed"]


async def test_who_asks_for_nothing_is_diagnosed_behind_the_reply(server):
    a, b = Replica(server.url, "a"), Replica(server.url, "b")
    await a.post(agent_body("x"))
    await a.noted(1)
    await b.post(agent_body("x", tool="Weighs anything."))
    assert await b.causes(1) == ["tools_changed"]


@pytest.mark.parametrize("asks", [False, True])
async def test_no_reply_waits_for_a_redis_that_hangs(server: RedisServer, asks: bool):
    b = Replica(server.url, "b", takes_s=0.0)
    await b.post(agent_body("first"), "known")
    await b.noted(1)
    server.stop()
    try:
        make = partial(asking, previous="msg_a1") if asks else agent_body
        # The next ones of a session come while the first is still being asked for.
        for i in range(8):
            reply, seconds = await b.post(make("x"), "one" if i < 4 else f"{i}")
            assert seconds < READ_S / 2, i
            if asks and i == 0:
                assert json.loads(reply)["diagnostics"] == {"cache_miss_reason": None}
        await asyncio.sleep(READ_S * 5)
        # All of them have been diagnosed all the same, in order.
        diagnoser = b.handler.services.diagnoser
        (org,) = diagnoser.orgs()
        assert diagnoser.purge(org, "one") == 4
        assert diagnoser.purge(org, None) == 5
    finally:
        server.resume()
