"""The HTTP side: reads what clients ask of the cache, and tells them what they got."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import partial
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_cachescope.api.diagnoser import BreakLog, PendingDiagnosis
from vllm_cachescope.api.diffs import Diffs
from vllm_cachescope.api.operations import PATHS, Engines, Operations
from vllm_cachescope.api.replies import Reply
from vllm_cachescope.api.request_context import RequestContext, current_request
from vllm_cachescope.config import Config
from vllm_cachescope.errors import BadRequest
from vllm_cachescope.logs import logger_of
from vllm_cachescope.prompt.request import PromptRequest
from vllm_cachescope.tenancy.caller import CallerDirectory, api_key
from vllm_cachescope.wire import READERS, protocol_of, strip
from vllm_cachescope.wire.body import decode, encode
from vllm_cachescope.wire.errors import error_body

logger = logger_of(__name__)


class CacheScopeMiddleware(ABC):
    """ASGI middleware around an inference server.

    A subclass knows the server: how to come by the configuration, and how to get the exchange's
    plan to the engine and its reports back.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._config: Config | None = None
        self._directory: CallerDirectory | None = None
        self._breaks: BreakLog | None = None
        self._operations: Operations | None = None

    @abstractmethod
    def attach(self, state: Any) -> Config:
        """Connect to the server behind ``state`` (of the ASGI application) and return the
        configuration. Called once, before the first request."""

    @abstractmethod
    def block_tokens(self, state: Any) -> int:
        """Return the number of tokens in one of the server's cache blocks."""

    @abstractmethod
    def server_keys(self, state: Any) -> Iterable[str]:
        """Return the API keys the server itself insists on; none if it lets anyone in."""

    @abstractmethod
    def engines(self, state: Any) -> Engines:
        """Return the engines behind the server."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, self._attaching(scope, receive), send)
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"].endswith(PATHS):
            await (await self._operate(scope, receive))(scope, receive, send)
            return
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        config = self._attached(scope)
        assert self._directory is not None
        headers = _headers(scope)
        if not self._is_known(scope, headers):
            # The server will refuse it; nothing is done for a client it does not know.
            await self._app(scope, receive, send)
            return
        protocol = protocol_of(scope["path"])
        if protocol is None:
            await self._run(
                RequestContext(self._directory.caller(headers, None)), scope, receive, send
            )
            return

        raw, receive = await _read_body(receive)
        body = decode(raw)
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
            raw = encode(forwarded)
            scope = {**scope, "headers": _with_length(scope["headers"], len(raw))}
            receive = _replaying(raw, receive)
        exchange = RequestContext(
            self._directory.caller(headers, request.session), request, forwarded
        )
        # Taking in a long prompt takes some milliseconds, which the first token need not wait for
        # unless the client wants to hear of it.
        case = None
        if request.diagnose:
            case = self._open_case(exchange, request, body, headers)
        stream_prewarm = request.prewarm and body.get("stream") is True
        reply = Reply(exchange, send, case, stream_prewarm)
        try:
            await self._run(exchange, scope, receive, reply.send)
        finally:
            explain = partial(self._explain, exchange, reply, case, body, headers)
            if exchange.fetching is None:
                explain()
            else:
                exchange.fetching.add_done_callback(lambda _: explain())

    async def _run(
        self, exchange: RequestContext, scope: Scope, receive: Receive, send: Send
    ) -> None:
        token = current_request.set(exchange)
        try:
            await self._app(scope, receive, send)
        finally:
            current_request.reset(token)

    def _explain(
        self,
        exchange: RequestContext,
        reply: Reply,
        case: PendingDiagnosis | None,
        body: dict[str, Any],
        headers: dict[str, str],
    ) -> None:
        """Diagnose a request that is over; ``case`` is None if that was put off until now."""
        if case is None and exchange.reports and exchange.request is not None:
            case = self._open_case(exchange, exchange.request, body, headers)
        if case is not None:
            self._close_case(case, exchange, reply)

    def _open_case(
        self,
        exchange: RequestContext,
        request: PromptRequest,
        body: dict[str, Any],
        headers: dict[str, str],
    ) -> PendingDiagnosis | None:
        assert self._breaks is not None
        try:
            return self._breaks.open(exchange.caller, request, body, headers, exchange.reports)
        except Exception:
            # A request is worth more than its diagnosis.
            logger.exception("The request could not be diagnosed")
            return None

    def _close_case(self, case: PendingDiagnosis, exchange: RequestContext, reply: Reply) -> None:
        assert self._breaks is not None
        try:
            reports, passages = exchange.reports.values(), exchange.passages.values()
            self._breaks.close(case, reports, reply.id, passages)
        except Exception:
            logger.exception("The request could not be diagnosed")

    async def _operate(self, scope: Scope, receive: Receive) -> Response:
        self._attached(scope)
        assert self._operations is not None
        headers = _headers(scope)

        async def read_body() -> bytes:
            return (await _read_body(receive))[0]

        known = self._is_known(scope, headers)
        return await self._operations.answer(
            scope["method"], scope["path"], headers, known, read_body
        )

    def _is_known(self, scope: Scope, headers: dict[str, str]) -> bool:
        keys = list(self.server_keys(scope["app"].state))
        return not keys or api_key(headers) in keys

    def _attached(self, scope: Scope) -> Config:
        if self._config is None:
            self._config = self.attach(scope["app"].state)
            secret = self._config.secret_bytes()
            self._directory = CallerDirectory(
                secret, self._config.tenant_names(), self._config.org_header
            )
            wanted = self._config.diffs
            diffs = None if wanted is None else Diffs(wanted, time.monotonic)
            self._breaks = BreakLog(secret, self.block_tokens(scope["app"].state), diffs=diffs)
            engines = self.engines(scope["app"].state)
            self._operations = Operations(self._config, self._directory, self._breaks, engines)
        return self._config

    def _attaching(self, scope: Scope, receive: Receive) -> Receive:
        """Attach as soon as the server starts, so that a mistake shows then."""

        async def attaching() -> Message:
            message = await receive()
            if message["type"] == "lifespan.startup":
                self._attached(scope)
            return message

        return attaching


def _headers(scope: Scope) -> dict[str, str]:
    """Return the request's headers, names in lower case. Each character is a byte."""
    headers: dict[str, str] = {}
    for name, value in scope["headers"]:
        key, text = name.decode("latin-1").lower(), value.decode("latin-1")
        # Lines of one name are a list, in their order (RFC 9110, 5.2 and 5.3).
        headers[key] = f"{headers[key]}, {text}" if key in headers else text
    return headers


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
