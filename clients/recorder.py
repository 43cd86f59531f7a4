"""A proxy between a client and the server: passes every byte on, and writes down what passes."""

import json
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from demo.server import free_port

_HOP = {"host", "connection", "transfer-encoding", "keep-alive"}
_METHODS = ["GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS"]
_START_S = 10


@dataclass(slots=True)
class Exchange:
    """A request that a client made, and what it got.

    Attributes:
        path: the path without its query.
        headers: the request's, names in lower case.
        body: the request's JSON; None where it has none.
        status: of the reply; 0 until there is one.
        reply: the reply's bytes.
    """

    path: str
    headers: dict[str, str]
    body: Any
    status: int = 0
    reply: bytearray = field(default_factory=bytearray)


class Recorder:
    """A running proxy in front of ``upstream``. As a context manager it is gone after exit.

    Args:
        upstream: URL of the server.

    Attributes:
        url: where clients find it.
        exchanges: what has passed so far.
    """

    def __init__(self, upstream: str) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.exchanges: list[Exchange] = []
        self._client = httpx.AsyncClient(base_url=upstream, timeout=None)
        app = Starlette(routes=[Route("/{path:path}", self._pass_on, methods=_METHODS)])
        self._server = uvicorn.Server(
            uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error")
        )
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        deadline = time.monotonic() + _START_S
        while not self._server.started and time.monotonic() < deadline:
            time.sleep(0.02)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.should_exit = True
        self._thread.join(_START_S)

    def write(self, file: Path) -> None:
        """Write what has passed to ``file``, a line of JSON for each request with a body.

        ``cachescope explain`` and ``lint`` read it.
        """
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "w") as lines:
            for exchange in self.exchanges:
                if exchange.body is None:
                    continue
                reply = exchange.reply.decode(errors="replace")
                print(json.dumps({**asdict(exchange), "reply": reply}), file=lines)

    async def _pass_on(self, request: Request) -> StreamingResponse:
        raw = await request.body()
        try:
            body = json.loads(raw)
        except ValueError:
            body = None
        exchange = Exchange(request.url.path, dict(request.headers), body)
        self.exchanges.append(exchange)
        headers = [
            (name, value)
            for name, value in request.headers.raw
            if name.decode().lower() not in _HOP
        ]
        target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        sent = self._client.build_request(request.method, target, headers=headers, content=raw)
        reply = await self._client.send(sent, stream=True)
        exchange.status = reply.status_code

        async def chunks() -> AsyncIterator[bytes]:
            async for chunk in reply.aiter_raw():
                exchange.reply.extend(chunk)
                yield chunk

        own = {k: v for k, v in reply.headers.items() if k not in _HOP}
        return StreamingResponse(
            chunks(), reply.status_code, own, background=BackgroundTask(reply.aclose)
        )
