"""The gateway: CacheScope's API side in a process of its own, in front of vLLM's Rust server."""

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import uvicorn
from prometheus_client import CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Mount
from starlette.types import ASGIApp

from vllm_cachescope.api.middleware import CacheScopeMiddleware
from vllm_cachescope.api.services import Server, directory_of
from vllm_cachescope.config import Config
from vllm_cachescope.connectors.vllm.engine_processes import HEED_S, EngineProcesses
from vllm_cachescope.connectors.vllm.gateway.engine_ports import EnginePorts
from vllm_cachescope.connectors.vllm.gateway.planner import OpenPlanner
from vllm_cachescope.connectors.vllm.gateway.proxy import Proxy
from vllm_cachescope.connectors.vllm.gateway.upstream import Upstream
from vllm_cachescope.connectors.vllm.store_factory import note_stores
from vllm_cachescope.logs import logger_of
from vllm_cachescope.tiers.keyspace import secret_digest

WAIT_S = 0.5
"""How often a server that is not up yet is asked, in seconds."""

logger = logger_of(__name__)


class GatewayMiddleware(CacheScopeMiddleware):
    """CacheScope's API side in front of the proxy.

    Args:
        app: the proxy.
        server: the server behind it.
    """

    def __init__(self, app: ASGIApp, server: Server) -> None:
        super().__init__(app)
        self._server = server

    def connect(self, state: Any) -> Server:
        """Return the server."""
        return self._server


async def serve(
    config: Config,
    upstream_url: str,
    engine_urls: Sequence[str],
    host: str,
    port: int,
    api_keys: Sequence[str],
) -> None:
    """Serve until the process is told to end.

    Args:
        config: the engines' configuration.
        upstream_url: the address of vLLM's Rust server.
        engine_urls: the addresses of the engines' own ports, by rank.
        host: the address to bind to.
        port: the port.
        api_keys: the API keys that the server insists on; none if it lets anyone in.

    Raises:
        ConfigError: if the configuration cannot be used.
    """
    secret, directory = config.secret_bytes(), directory_of(config, api_keys)
    upstream, ports = Upstream(upstream_url), EnginePorts(engine_urls, secret)
    planner, registry = OpenPlanner(config, directory), CollectorRegistry()
    model_name, facts = await _up(upstream, ports, api_keys)
    replica = (config.ledger and config.ledger.replica) or f"{socket.gethostname()}:{port}"
    # There may be other gateways to these engines.
    engines = EngineProcesses(ports.call, replica, has_others=True)
    server = Server(
        config,
        model_name=model_name,
        block_tokens=facts["block_tokens"],
        api_keys=api_keys,
        engines=engines,
        purge_renderings=planner.purge,
        registry=registry,
        replica=replica,
        note_stores=note_stores(config.tiers, secret_digest(secret), time.monotonic),
    )
    proxy = Proxy(upstream, planner, ports.call, secret, lambda: generate_latest(registry))

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        tasks = [
            asyncio.create_task(engines.sweep_every(config.sweep_interval)),
            asyncio.create_task(engines.heed_every(HEED_S)),
        ]
        yield
        for task in tasks:
            task.cancel()
        await upstream.close()
        await ports.close()

    app = Starlette(
        routes=[Mount("/", proxy)],
        middleware=[Middleware(GatewayMiddleware, server=server)],
        lifespan=lifespan,
    )
    logger.info("CacheScope's gateway to %s is at http://%s:%d", upstream_url, host, port)
    settings = uvicorn.Config(app, host, port, log_level="warning", access_log=False)
    await uvicorn.Server(settings).serve()


async def _up(
    upstream: Upstream,
    ports: EnginePorts,
    api_keys: Sequence[str],
    pause: Callable[[float], Any] = asyncio.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[str, dict[str, Any]]:
    """Wait until server and engines are up; return the model's name and what an engine tells."""
    headers = {"authorization": f"Bearer {api_keys[0]}"} if api_keys else {}
    said_at = None
    while True:
        try:
            facts, *_ = await ports.call("facts")
            return await upstream.model_name(headers), facts
        except (aiohttp.ClientError, TimeoutError) as error:
            if said_at is None or clock() - said_at > 30:
                said_at = clock()
                logger.info("Waiting for the server: %s", error)
        await pause(WAIT_S)


def known_api_keys() -> list[str]:
    """Return the API keys that the server insists on, from vLLM's variable."""
    return [key for key in [os.environ.get("VLLM_API_KEY", "")] if key]
