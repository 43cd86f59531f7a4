"""The handler of HTTP requests: reads the cache fields of each, has the server answer it, writes
the usage into the reply, and diagnoses the request."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from vllm_cachescope.api.diagnoser import PendingDiagnosis
from vllm_cachescope.api.http_request import joined_headers, read_body, with_body
from vllm_cachescope.api.operations import PATHS
from vllm_cachescope.api.prewarming import one_token_body
from vllm_cachescope.api.replies import Reply
from vllm_cachescope.api.request_context import RequestContext, current_request
from vllm_cachescope.api.services import Services
from vllm_cachescope.errors import BadRequest
from vllm_cachescope.logs import logger_of
from vllm_cachescope.prompt.global_scope import without_global
from vllm_cachescope.prompt.request import Protocol
from vllm_cachescope.wire import READERS, protocol_of, strip
from vllm_cachescope.wire.body import decode, encode
from vllm_cachescope.wire.errors import error_body

logger = logger_of(__name__)


@dataclass(frozen=True, slots=True)
class RequestHandler:
    """Serves the requests of one server.

    Attributes:
        app: the server.
        services: what its requests are served with.
    """

    app: ASGIApp
    services: Services

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a POST request, or a request for an operation."""
        headers = joined_headers(scope)
        protocol = protocol_of(scope["path"])
        if scope["path"].endswith(PATHS):
            await self._operate(headers, scope, receive, send)
        elif not self.services.is_known(headers):
            # The server will refuse it; nothing is done for a client it does not know.
            await self.app(scope, receive, send)
        elif protocol is None:
            context = RequestContext(self.services.directory.caller(headers, None))
            await self._run(context, scope, receive, send)
        else:
            await self._serve(protocol, headers, scope, receive, send)

    async def _operate(
        self, headers: Mapping[str, str], scope: Scope, receive: Receive, send: Send
    ) -> None:
        async def body() -> bytes:
            return (await read_body(scope, receive))[0]

        known = self.services.is_known(headers)
        answer = await self.services.operations.answer(
            scope["method"], scope["path"], headers, known, body
        )
        await answer(scope, receive, send)

    async def _serve(
        self,
        protocol: Protocol,
        headers: Mapping[str, str],
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        config = self.services.config
        raw, replayed = await read_body(scope, receive)
        body = decode(raw)
        del raw  # It may be megabytes, and the request long.
        if not isinstance(body, dict):
            await self.app(scope, replayed, send)
            return
        try:
            request = READERS[protocol](
                body,
                config.allowed_ttls,
                config.regions.messages.ttl_s,
                config.markers.is_strict(protocol),
            )
        except BadRequest as error:
            await JSONResponse(error_body(protocol, error), 400)(scope, replayed, send)
            return
        directory = self.services.directory
        caller = directory.caller(headers, request.session)
        if not directory.may_write_global(caller.org):
            request = without_global(request)
        self.services.ignored_markers.count(request)
        forwarded = strip(body)
        if request.prewarm:
            forwarded = one_token_body(forwarded)
        if forwarded is not body:
            scope, replayed = with_body(scope, receive, encode(forwarded))
        context = RequestContext(caller, request, forwarded)
        # Opened now only for a client that wants to hear of it: fingerprints of a long prompt take
        # some milliseconds, which the first token of other requests need not wait for.
        pending = self._open(context, body, headers) if request.diagnose else None
        stream_prewarm = request.prewarm and body.get("stream") is True
        reply = Reply(context, send, pending, stream_prewarm)
        try:
            await self._run(context, scope, replayed, reply.send)
        finally:
            diagnose = partial(self._diagnose, context, reply, pending, body, headers)
            if context.fetching is None:
                diagnose()
            else:
                context.fetching.add_done_callback(lambda _: diagnose())

    async def _run(
        self, context: RequestContext, scope: Scope, receive: Receive, send: Send
    ) -> None:
        token = current_request.set(context)
        try:
            await self.app(scope, receive, send)
        finally:
            current_request.reset(token)

    def _diagnose(
        self,
        context: RequestContext,
        reply: Reply,
        pending: PendingDiagnosis | None,
        body: Mapping[str, Any],
        headers: Mapping[str, str],
    ) -> None:
        """Diagnose a request that is over; ``pending`` is None if that was put off until now."""
        if pending is None and context.reports:
            pending = self._open(context, body, headers)
        if pending is not None:
            self._close(pending, context, reply)

    # A mistake in a diagnosis costs the diagnosis, and never the request.

    def _open(
        self, context: RequestContext, body: Mapping[str, Any], headers: Mapping[str, str]
    ) -> PendingDiagnosis | None:
        assert context.request is not None
        try:
            return self.services.diagnoser.open(
                context.caller, context.request, body, headers, context.reports
            )
        except Exception:
            logger.exception("The request could not be diagnosed")
            return None

    def _close(self, pending: PendingDiagnosis, context: RequestContext, reply: Reply) -> None:
        try:
            reports, timings = context.reports.values(), context.timings.values()
            self.services.diagnoser.close(pending, reports, reply.id, timings)
        except Exception:
            logger.exception("The request could not be diagnosed")
