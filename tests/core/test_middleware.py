"""When the middleware connects to the server behind it."""

from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_cachescope.api.engines import Engines, Purged
from vllm_cachescope.api.middleware import CacheScopeMiddleware
from vllm_cachescope.api.services import Server
from vllm_cachescope.config import load


class Nothing(Engines):
    """No engines: no request gets that far here."""

    async def health(self) -> list[list[dict[str, Any]]]:
        return []

    async def end_session(self, owners) -> int:
        return 0

    async def purge(
        self, prefix: bytes, org: str | None = None, session: str | None = None
    ) -> Purged:
        return Purged()


class Application:
    state = "the state"


async def server(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "answered"})


class Connecting(CacheScopeMiddleware):
    def __init__(self, served: ASGIApp = server) -> None:
        super().__init__(served)
        self.states: list[object] = []

    def connect(self, state: Any) -> Server:
        self.states.append(state)
        config = load({"secret": "a secret of the tests"})
        return Server(config, "m", 16, (), Nothing(), lambda *_: None, CollectorRegistry())


async def serve(
    middleware: Connecting, kind: str, sent_body: bytes = b"{}", **fields: object
) -> None:
    """Have one connection served, of which the server gets one message."""
    sent: list[Message] = []

    async def receive() -> Message:
        body = {"body": sent_body, "more_body": False}
        return {"type": "lifespan.startup" if kind == "lifespan" else "http.request", **body}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": kind, "headers": [], "app": Application(), **fields}
    await middleware(scope, receive, send)
    assert sent == [{"type": "answered"}]


@pytest.mark.parametrize("announced", [True, False])
async def test_it_connects_once_at_the_start_or_with_the_first_request(announced: bool) -> None:
    middleware = Connecting()
    await serve(middleware, "http", method="GET", path="/v1/models")
    assert not middleware.states
    if announced:
        await serve(middleware, "lifespan")
        assert middleware.states == ["the state"]
    for path in ("/v1/messages", "/tokenize"):
        await serve(middleware, "http", method="POST", path=path)
        assert middleware.states == ["the state"]
