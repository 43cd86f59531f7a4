"""The HTTP side: stands in front of an inference server as ASGI middleware."""

from abc import ABC, abstractmethod
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_cachescope.api.operations import operation_of
from vllm_cachescope.api.page import is_page_path
from vllm_cachescope.api.request_handler import RequestHandler
from vllm_cachescope.api.services import Server, Services


class CacheScopeMiddleware(ABC):
    """ASGI middleware around an inference server, which a subclass knows.

    The subclass also gets each request's plan to the engine, and the engine's reports back into
    the `RequestContext` that is current.

    Args:
        app: the server.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._handler: RequestHandler | None = None

    @abstractmethod
    def connect(self, state: Any) -> Server:
        """Connect to the server and describe it. Called once: when the server starts, or if it
        announces no start, with the first request.

        Args:
            state: that of the ASGI application.

        Raises:
            ConfigError: if the configuration cannot be used.
        """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a connection, as ASGI has it."""
        if scope["type"] == "lifespan":
            await self._app(scope, self._connecting(scope, receive), send)
        elif scope["type"] == "http" and (
            scope["method"] == "POST"
            or operation_of(scope["path"]) is not None
            or is_page_path(scope["path"])
        ):
            await self.connected(scope).handle(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _connecting(self, scope: Scope, receive: Receive) -> Receive:
        """Connect as soon as the server starts, so that a mistake shows then."""

        async def connecting() -> Message:
            message = await receive()
            if message["type"] == "lifespan.startup":
                self.connected(scope)
            return message

        return connecting

    def connected(self, scope: Scope) -> RequestHandler:
        """Return the handler of requests, connected to the server by now.

        Raises:
            ConfigError: if the configuration cannot be used.
        """
        if self._handler is None:
            services = Services.of(self.connect(scope["app"].state))
            self._handler = RequestHandler(self._app, services)
        return self._handler
