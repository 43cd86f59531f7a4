"""The HTTP side: reads what clients ask of the cache, and tells them what they got."""

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_cachescope.api.exchange import Exchange, current_exchange
from vllm_cachescope.api.replies import Reply
from vllm_cachescope.config import Config
from vllm_cachescope.errors import BadRequest
from vllm_cachescope.identity import Directory, api_key
from vllm_cachescope.wire import READERS, protocol_of, strip
from vllm_cachescope.wire.errors import error_body

logger = logging.getLogger(__name__)


class CacheScopeMiddleware(ABC):
    """ASGI middleware around an inference server.

    A subclass knows the server: how to come by the configuration, and how to get the exchange's
    plan to the engine and its reports back.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._config: Config | None = None
        self._directory: Directory | None = None

    @abstractmethod
    def attach(self, state: Any) -> Config:
        """Connect to the server behind ``state`` (of the ASGI application) and return the
        configuration. Called once, before the first request."""

    @abstractmethod
    def server_keys(self, state: Any) -> Iterable[str]:
        """Return the API keys the server itself insists on; none if it lets anyone in."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, self._attaching(scope, receive), send)
            return
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        config = self._attached(scope)
        assert self._directory is not None
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        keys = list(self.server_keys(scope["app"].state))
        if keys and api_key(headers) not in keys:
            # The server will refuse it; nothing is done for a client it does not know.
            await self._app(scope, receive, send)
            return
        protocol = protocol_of(scope["path"])
        if protocol is None:
            await self._run(Exchange(self._directory.caller(headers, None)), scope, receive, send)
            return

        raw, receive = await _read_body(receive)
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            await self._app(scope, receive, send)
            return
        try:
            request = READERS[protocol](body, config.allowed_ttls, config.regions.messages.ttl)
        except BadRequest as error:
            await JSONResponse(error_body(protocol, error), 400)(scope, receive, send)
            return

        forwarded = strip(body)
        if request.prewarm:
            forwarded = _filling_only(forwarded)
        if forwarded is not body:
            raw = json.dumps(forwarded).encode()
            scope = {**scope, "headers": _with_length(scope["headers"], len(raw))}
            receive = _replaying(raw, receive)
        exchange = Exchange(self._directory.caller(headers, request.session), request, forwarded)
        stream_prewarm = request.prewarm and body.get("stream") is True
        reply = Reply(exchange, send, stream_prewarm)
        await self._run(exchange, scope, receive, reply.send)

    async def _run(self, exchange: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
        token = current_exchange.set(exchange)
        try:
            await self._app(scope, receive, send)
        finally:
            current_exchange.reset(token)

    def _attached(self, scope: Scope) -> Config:
        if self._config is None:
            self._config = self.attach(scope["app"].state)
            self._directory = Directory(
                self._config.secret_bytes(), self._config.tenant_names(), self._config.org_header
            )
        return self._config

    def _attaching(self, scope: Scope, receive: Receive) -> Receive:
        """Attach as soon as the server starts, so that a mistake shows then."""

        async def attaching() -> Message:
            message = await receive()
            if message["type"] == "lifespan.startup":
                self._attached(scope)
            return message

        return attaching


def _filling_only(body: dict[str, Any]) -> dict[str, Any]:
    """Return the body of a request that makes one token, which is what it takes to fill the cache;
    the reply leaves it out."""
    limit = "max_output_tokens" if "input" in body else "max_tokens"
    filling = {**body, limit: 1, "stream": False}
    thinking = body.get("thinking")
    if isinstance(thinking, dict) and thinking.get("type") == "enabled":
        # It has a budget of more than one token, and no part in the prompt.
        del filling["thinking"]
    return filling


async def _read_body(receive: Receive) -> tuple[bytes, Receive]:
    """Return the whole body, and a `receive` that delivers it once more."""
    chunks: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            # The client has gone: let the server see that.
            return b"", _returning(message, receive)
        chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            break
    body = b"".join(chunks)
    return body, _replaying(body, receive)


def _replaying(body: bytes, receive: Receive) -> Receive:
    return _returning({"type": "http.request", "body": body, "more_body": False}, receive)


def _returning(first: Message, receive: Receive) -> Receive:
    pending = [first]

    async def receive_next() -> Message:
        return pending.pop() if pending else await receive()

    return receive_next


def _with_length(headers: Iterable[tuple[bytes, bytes]], length: int) -> list[tuple[bytes, bytes]]:
    kept = [(name, value) for name, value in headers if name.lower() != b"content-length"]
    return [*kept, (b"content-length", str(length).encode())]
