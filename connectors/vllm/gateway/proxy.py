"""The proxy: hands each request on to the server behind the gateway with its plan, and the answer
back."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from http import HTTPStatus
from typing import Any

import aiohttp
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from vllm_cachescope.api.http_request import read_body
from vllm_cachescope.api.request_context import PromptTiming, RequestContext, current_request
from vllm_cachescope.cache.report import Report
from vllm_cachescope.connectors.vllm.gateway.answer import Answer, ends, tells_usage
from vllm_cachescope.connectors.vllm.gateway.planner import OpenPlanner, has_one_prompt, with_plan
from vllm_cachescope.connectors.vllm.gateway.upstream import (
    Response,
    Upstream,
    replied_headers,
)
from vllm_cachescope.logs import logger_of
from vllm_cachescope.prompt.open_plan import OpenPlan
from vllm_cachescope.prompt.request import Protocol
from vllm_cachescope.tenancy.scope import Scope as CacheScope
from vllm_cachescope.wire.body import decode, encode

_PLANNED = (Protocol.CHAT, Protocol.COMPLETIONS)
"""The formats that the server has; it refuses the others by itself."""

_GENERATE = "/inference/v1/generate"

Command = Callable[..., Awaitable[list[Any]]]

logger = logger_of(__name__)


class Proxy:
    """The ASGI application behind the gateway's middleware.

    Args:
        upstream: the server.
        planner: plans the prompts.
        command: calls a command in every engine.
        secret: key of the plans' MACs.
        metrics: returns the gateway's own metrics, to stand behind the server's.
    """

    def __init__(
        self,
        upstream: Upstream,
        planner: OpenPlanner,
        command: Command,
        secret: bytes,
        metrics: Callable[[], bytes],
    ) -> None:
        self._upstream = upstream
        self._planner = planner
        self._command = command
        self._secret = secret
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, as ASGI has it."""
        if scope["type"] != "http":
            await send({"type": "websocket.close"})
            return
        exchange = Exchange(scope, send)
        try:
            await self._answer(scope, receive, exchange)
        except aiohttp.ClientConnectionError as error:
            if exchange.has_begun:
                raise
            message = f"the server behind this gateway does not answer: {error}"
            body = {"error": {"message": message, "type": "api_error", "code": 502}}
            await JSONResponse(body, 502)(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, exchange: "Exchange") -> None:
        context = current_request.get()
        raw, receive = await read_body(scope, receive)
        body: Mapping[str, Any] | None = None
        if context is not None and context.request is not None:
            body = context.body if context.request.protocol in _PLANNED else None
        elif context is not None and scope["path"].endswith(_GENERATE):
            decoded = decode(raw)
            body = decoded if isinstance(decoded, dict) else None
        if context is None or body is None:
            work = self._pass_on(exchange, scope, raw)
        else:
            work = self._run(context, body, exchange, scope)
        await _unless_disconnected(work, receive)

    async def _pass_on(self, exchange: "Exchange", scope: Scope, raw: bytes) -> None:
        response = await self._upstream.send(
            scope["method"], exchange.target, scope["headers"], raw
        )
        try:
            if scope["path"] == "/metrics" and response.status == HTTPStatus.OK:
                await exchange.begin(response)
                await exchange.body(await response.read() + self._metrics(), more=False)
            else:
                await exchange.copy(response)
        finally:
            response.close()

    async def _run(
        self,
        context: RequestContext,
        body: Mapping[str, Any],
        exchange: "Exchange",
        scope: Scope,
    ) -> None:
        with context.running():
            headers = _credentials(scope)
            with context.stage("plan"):
                plan = await self._planner.plan(
                    context, lambda part: self._upstream.tokens(part, headers)
                )
            prompt = ServedPrompt(context, plan, self._command)
            is_told = context.request is not None and has_one_prompt(body)
            if not is_told:
                # Nobody asks for the reports of several prompts, nor takes one off.
                plan = OpenPlan(plan.spans, "", plan.owner)
            sent = with_plan(body, plan, self._secret)
            if context.request is not None and context.caller.session is not None:
                # So that KV events, and routers by them, know sessions that vLLM does not.
                sent["session_id"] = body.get("session_id") or context.caller.session
            if is_told:
                sent["return_token_ids"] = True
            response = await self._upstream.send(
                scope["method"], exchange.target, scope["headers"], encode(sent)
            )
            try:
                keeps_tokens = body.get("return_token_ids") is True
                answer = Answer(keeps_tokens, prompt.came, prompt.reported, prompt.put_out)
                if not is_told or response.status != HTTPStatus.OK:
                    await exchange.copy(response)
                elif response.headers.get("content-type", "").startswith("text/event-stream"):
                    await self._stream(response, answer, prompt, exchange)
                else:
                    whole = answer.whole(await response.read())
                    await exchange.begin(response)
                    await exchange.body(whole, more=False)
            finally:
                prompt.over(was_run=response.status == HTTPStatus.OK)
                response.close()

    async def _stream(
        self, response: Response, answer: Answer, prompt: "ServedPrompt", exchange: "Exchange"
    ) -> None:
        await exchange.begin(response)
        is_over = False
        async for chunk in response.content.iter_any():
            out: list[bytes] = []
            for event in answer.events(chunk):
                is_over |= ends(event)
                if is_over or tells_usage(event):
                    if out:
                        await exchange.body(b"".join(out))
                        out.clear()
                    await prompt.fetch_report(is_over)
                out.append(event)
            if out:
                await exchange.body(b"".join(out))
        await exchange.body(answer.rest(), more=False)


class Exchange:
    """One request and its answer.

    Args:
        scope: the request's, as ASGI has it.
        send: sends to its client.

    Attributes:
        target: the request's path with its query.
        has_begun: whether the client has the head of the answer.
    """

    def __init__(self, scope: Scope, send: Send) -> None:
        query = scope.get("query_string", b"").decode("latin-1")
        path = scope.get("raw_path", scope["path"].encode()).decode("latin-1")
        self.target = f"{path}?{query}" if query else path
        self.has_begun = False
        self._send = send

    async def begin(self, response: Response) -> None:
        """Send the head of an answer."""
        self.has_begun = True
        await self._send(
            {
                "type": "http.response.start",
                "status": response.status,
                "headers": replied_headers(response),
            }
        )

    async def body(self, body: bytes, more: bool = True) -> None:
        """Send a part of an answer's body."""
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def copy(self, response: Response) -> None:
        """Send an answer as it is."""
        await self.begin(response)
        async for chunk in response.content.iter_any():
            await self.body(chunk)
        await self.body(b"", more=False)


class ServedPrompt:
    """The prompt of one request, and what becomes known of it while the server answers.

    Args:
        context: the request.
        plan: its plan.
        command: calls a command in every engine.
    """

    def __init__(self, context: RequestContext, plan: OpenPlan, command: Command) -> None:
        self._context = context
        self._plan = plan
        self._command = command
        self._began = time.monotonic()
        self._tokens: list[int] = []
        self._output_tokens = 0
        self._computed_at: float | None = None
        self._is_whole = False

    def came(self, tokens: list[int]) -> None:
        """Note the prompt's tokens."""
        self._tokens = tokens

    def put_out(self, tokens: int) -> None:
        """Note that the server has put out so many more tokens."""
        if tokens:
            self._output_tokens += tokens
            self._computed_at = self._computed_at or time.monotonic()

    def reported(self, data: Mapping[str, Any]) -> None:
        """Note the engine's report, as it travels."""
        if self._tokens:
            self._context.reports[self._plan.nonce] = Report.from_wire(dict(data))

    async def fetch_report(self, is_over: bool) -> None:
        """Have the engine report, unless it has told all.

        Args:
            is_over: whether it has computed the whole answer.
        """
        if self._is_whole or not self._plan.nonce:
            return
        for data in await self._reports():
            self.reported(data)
            self._is_whole = is_over

    async def _reports(self) -> list[dict[str, Any]]:
        try:
            answers = await self._command("report", self._plan.nonce)
        except TimeoutError as error:
            logger.warning("The engine's report could not be fetched: %s", error)
            return []
        return [data for data in answers if data is not None]

    def over(self, was_run: bool) -> None:
        """Note that the server is done, or the client gone.

        Args:
            was_run: whether the server has taken the request.
        """
        loop = asyncio.get_running_loop()
        if not self._tokens:
            if was_run and self._context.is_recorded:
                # The client went before the first token. Only the request's record tells of it.
                self._context.fetching = loop.create_task(self._fetch_untold())
            return
        context, plan = self._context, self._plan.closed(self._tokens)
        has_session = context.caller.session is not None
        readable = [
            span.end for span in plan.spans if has_session or span.scope is not CacheScope.SESSION
        ]
        context.timings[plan.nonce] = PromptTiming(
            self._tokens,
            plan.covered_tokens,
            max(readable, default=0),
            self._began,
            self._computed_at or time.monotonic(),
            self._output_tokens,
        )
        context.plans[plan.nonce] = plan
        if plan.nonce not in context.reports:
            # Not awaited: the client's task may be cancelled.
            context.fetching = loop.create_task(self.fetch_report(True))

    async def _fetch_untold(self) -> None:
        for data in await self._reports():
            self._context.untold[self._plan.nonce] = Report.from_wire(data)


def _credentials(scope: Scope) -> dict[str, str]:
    headers = Headers(scope=scope)
    return {name: headers[name] for name in ("authorization", "x-api-key") if name in headers}


async def _unless_disconnected(work: Any, receive: Receive) -> None:
    """Do ``work``, and cut it off when the client disconnects."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, waiting = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait([working, waiting], return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
        if not working.done():
            working.cancel()
        with suppress(asyncio.CancelledError):
            await working
