"""The handler of HTTP requests: reads the cache fields of each, has the server answer it, writes
the usage into the reply, and diagnoses the request."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from starlette.datastructures import QueryParams
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_cachescope.api.collection_pause import CollectionPause
from vllm_cachescope.api.http_request import joined_headers, read_body, with_body
from vllm_cachescope.api.incoming_body import LARGE_BYTES, read_incoming
from vllm_cachescope.api.mending import Mending, Trial, wants_repair
from vllm_cachescope.api.operations import operation_of
from vllm_cachescope.api.page import Page, is_page_path
from vllm_cachescope.api.parsed_body import hand_over
from vllm_cachescope.api.replies import Reply
from vllm_cachescope.api.request_context import RequestContext, current_request
from vllm_cachescope.api.request_diagnoses import RequestDiagnoses
from vllm_cachescope.api.services import Services
from vllm_cachescope.api.viewer import Viewer
from vllm_cachescope.errors import BadRequest
from vllm_cachescope.logs import logger_of
from vllm_cachescope.prompt.global_scope import without_global
from vllm_cachescope.prompt.request import Protocol
from vllm_cachescope.tenancy.scope import Caller
from vllm_cachescope.wire import protocol_of
from vllm_cachescope.wire.body import encode
from vllm_cachescope.wire.errors import error_body
from vllm_cachescope.wire.session_end import (
    FIELD,
    HEADER,
    NEEDS_SESSION,
    header_says_over,
    without_end,
)

logger = logger_of(__name__)

USAGE_HEADER = "x-cachescope-usage"
"""A client that sends ``tiers`` here is told in its usage how many tokens each tier had."""


class RequestHandler:
    """Serves the requests of one server.

    Args:
        app: the server.
        services: what its requests are served with.

    Attributes:
        services: the same.
    """

    def __init__(self, app: ASGIApp, services: Services) -> None:
        self._app = app
        self.services = services
        self._diagnoses = RequestDiagnoses(services)
        self._collection = CollectionPause()

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a POST request, or a request for an operation."""
        headers = joined_headers(scope)
        protocol = protocol_of(scope["path"])
        if operation_of(scope["path"]) is not None:
            await self._operate(headers, scope, receive, send)
        elif (page := self.services.page) is not None and is_page_path(scope["path"]):
            await self._show(page, headers, scope, receive, send)
        elif not self.services.is_known(headers):
            # The server will refuse it; nothing is done for a client it does not know.
            await self._app(scope, receive, send)
        elif protocol is None:
            caller = self.services.directory.caller(headers, None)
            await self._pass_on(RequestContext(caller), scope, receive, send)
        else:
            with ExitStack() as held:
                await self._serve(protocol, headers, scope, receive, send, held)

    async def _operate(
        self, headers: Mapping[str, str], scope: Scope, receive: Receive, send: Send
    ) -> None:
        async def body() -> bytes:
            return (await read_body(scope, receive))[0]

        known = self.services.is_known(headers)
        answer = await self.services.operations.answer(
            scope["method"],
            scope["path"],
            headers,
            known,
            body,
            QueryParams(scope.get("query_string", b"")),
        )
        await answer(scope, receive, send)

    async def _show(
        self,
        page: Page,
        headers: Mapping[str, str],
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        query = QueryParams(scope["query_string"])

        def viewer() -> Viewer:
            return self.services.viewer(headers)

        answer = await page.answer(scope["method"], scope["path"], query, headers, viewer)
        await answer(scope, receive, send)

    async def _serve(
        self,
        protocol: Protocol,
        headers: Mapping[str, str],
        scope: Scope,
        receive: Receive,
        send: Send,
        held: ExitStack,
    ) -> None:
        raw, replayed = await read_body(scope, receive)
        if len(raw) >= LARGE_BYTES:
            send = self._pausing(held, send)
        try:
            wants_tiers = _wants_tiers(headers)
            wants_repair(headers)
            says_over = header_says_over(headers)
            takes_parsed = self.services.takes_parsed
            body = await read_incoming(raw, protocol, self.services.config, takes_parsed)
        except BadRequest as error:
            await JSONResponse(error_body(protocol, error), 400)(scope, replayed, send)
            return
        del raw  # It may be megabytes, and the request long.
        if body is None:
            await self._app(scope, replayed, send)
            return
        directory = self.services.directory
        caller = directory.caller(headers, body.request.session)
        if caller.session is None and (says_over or body.request.session_over):
            if says_over or self.services.config.markers.is_strict(protocol):
                mistake = BadRequest(HEADER if says_over else FIELD, True, NEEDS_SESSION)
                await JSONResponse(error_body(protocol, mistake), 400)(scope, replayed, send)
                return
            body = replace(body, request=without_end(body.request))
        wanted = wants_tiers, says_over or body.request.session_over
        is_global = directory.may_write_global(caller.org)
        if not is_global:
            body = replace(body, request=without_global(body.request))
        mending = await self.services.mender.mend(caller, body, headers, is_global)
        if not mending.is_repaired:
            if body.parsed is not None:
                scope = hand_over(scope, body.parsed)
            elif body.raw is not None:
                scope, replayed = with_body(scope, receive, body.raw)
            await self._attempt(mending, caller, *wanted, headers, scope, replayed, send)
            return
        del replayed
        assert mending.body.raw is not None
        mended = with_body(scope, receive, mending.body.raw)
        if not await self._attempt(mending, caller, *wanted, headers, *mended, send):
            mending = self.services.mender.unmended(mending, body)
            sent = with_body(scope, receive, body.raw or encode(body.forwarded))
            await self._attempt(mending, caller, *wanted, headers, *sent, send)

    def _pausing(self, held: ExitStack, send: Send) -> Send:
        """Pause collection until the server answers, or ``held`` is left."""
        let_go = held.enter_context(self._collection.held())

        async def answer(message: Message) -> None:
            let_go()
            await send(message)

        return answer

    async def _attempt(
        self,
        mending: Mending,
        caller: Caller,
        wants_tiers: bool,
        ends_session: bool,
        headers: Mapping[str, str],
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> bool:
        """Have the server answer a body; return False if it refuses what was repaired."""
        body, client = mending.body, mending.client
        context = RequestContext(caller, body.request, body.forwarded, wants_tiers)
        context.is_recorded = self.services.recorder.is_used
        context.ends_session = ends_session
        # Opened now only for a client that wants to hear of it: fingerprints of a long prompt take
        # some milliseconds, which the first token of other requests need not wait for.
        opening = None
        if body.request.diagnose or mending.is_repaired:
            opening = await self._diagnoses.begin(context, mending, headers)
        stream_prewarm = body.request.prewarm and body.fields.get("stream") is True
        trial = Trial(send, mending.is_repaired, partial(self.services.mender.learn, mending))
        repairs = () if client is None else client.repairs
        reply = Reply(context, trial.send, opening, stream_prewarm, repairs)
        try:
            await self._run(context, scope, receive, reply.send)
        except Exception:
            if not mending.is_repaired or trial.has_begun:
                raise
            logger.exception("The server failed on a repaired request")
            trial.refused = True
        finally:
            context.end(partial(self._diagnoses.over, context, reply, opening, mending, headers))
        return not trial.refused

    async def _pass_on(
        self, context: RequestContext, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Serve a request whose body is not read."""
        context.is_recorded = self.services.recorder.is_used
        try:
            await self._run(context, scope, receive, send)
        finally:
            context.end(partial(self._diagnoses.record, context))

    async def _run(
        self, context: RequestContext, scope: Scope, receive: Receive, send: Send
    ) -> None:
        token = current_request.set(context)
        try:
            await self._app(scope, receive, send)
        finally:
            current_request.reset(token)


def _wants_tiers(headers: Mapping[str, str]) -> bool:
    """Tell whether the client asks for what was read by tier.

    Raises:
        BadRequest: if it asks for something else.
    """
    if (value := headers.get(USAGE_HEADER)) not in (None, "tiers"):
        raise BadRequest(USAGE_HEADER, value, "tiers")
    return value is not None
