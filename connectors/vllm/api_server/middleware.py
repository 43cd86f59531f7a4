"""The middleware of vLLM's API server: attached to it, or named with ``--middleware``."""

import asyncio
import atexit
import secrets
import time
from collections import Counter
from typing import Any

from vllm import envs

from vllm_cachescope.api.engines import Engines, Purged
from vllm_cachescope.api.middleware import CacheScopeMiddleware
from vllm_cachescope.api.services import Server, directory_of
from vllm_cachescope.connectors.vllm import config_check, engine_rpc, shm_regions
from vllm_cachescope.connectors.vllm.api_server.admission import Admission
from vllm_cachescope.logs import logger_of
from vllm_cachescope.tiers.purges import PURGE_S

ANSWER_S = 10.0
"""How long an engine may take to answer a command, in seconds: longer than a long step."""

logger = logger_of(__name__)


class Middleware(CacheScopeMiddleware):
    """CacheScope's API side, connected to vLLM's engine client."""

    def connect(self, state: Any) -> Server:
        """Return the server, which is connected to by now unless the plugin was not loaded.

        Raises:
            ConfigError: if the configuration cannot be used.
        """
        return getattr(state, "cachescope", None) or connect(state)


def connect(state: Any) -> Server:
    """Put the API side between vLLM's API server and its engine client.

    Args:
        state: that of vLLM's ASGI application.

    Raises:
        ConfigError: if the configuration cannot be used.
    """
    client = state.engine_client
    config = config_check.read(client.vllm_config.kv_transfer_config)
    api_keys = [key for key in (state.args.api_key or [envs.VLLM_API_KEY]) if key]
    directory = directory_of(config, api_keys)
    admission = Admission(state, config, config.secret_bytes(), directory)
    # vLLM kills its engine without letting it clean up. When this process ends, which does the
    # killing, the engine is gone.
    atexit.register(shm_regions.remove_stale)
    # A task that nothing refers to would be collected.
    state.cachescope_sweeper = asyncio.get_running_loop().create_task(
        _sweep(client, config.sweep_interval)
    )
    return Server(
        config,
        model_name=client.vllm_config.model_config.served_model_name,
        block_tokens=int(client.vllm_config.cache_config.block_size),
        api_keys=api_keys,
        engines=EngineProcesses(client),
        purge_renderings=admission.purge_renderings,
    )


class EngineProcesses(Engines):
    """The engine processes behind vLLM's engine client.

    Args:
        client: the engine client.
    """

    def __init__(self, client: Any) -> None:
        self._client = client

    async def health(self) -> list[list[dict[str, Any]]]:
        """Return the state of each tier of each engine process.

        Raises:
            TimeoutError: if an engine does not answer within `ANSWER_S`.
        """
        return await self._call("health")

    async def purge(self, prefix: bytes) -> Purged:
        """Purge in each engine process; wait until the remote tiers are done as well.

        Raises:
            TimeoutError: if an engine does not answer within `ANSWER_S`, or a remote tier is not
                done within twice `PURGE_S`.
        """
        purge_id = secrets.token_hex(8)
        entries: Counter[str] = Counter()
        for purged in await self._call("purge", prefix, purge_id):
            entries.update(purged)
        unreached: dict[str, str] = {}
        end = time.monotonic() + 2 * PURGE_S
        pause_s = 0.01
        while None in (answers := await self._call("purged", purge_id)):
            if time.monotonic() > end:
                raise TimeoutError("the purge does not end")
            await asyncio.sleep(pause_s)
            pause_s = min(0.5, 2 * pause_s)
        for answer in answers:
            for tier, (deleted, reason) in answer.items():
                entries[tier] += deleted
                if reason is not None:
                    unreached[tier] = reason
        return Purged(dict(entries), unreached)

    async def _call(self, command: str, *args: Any) -> list[Any]:
        return await asyncio.wait_for(engine_rpc.call(self._client, command, *args), ANSWER_S)


async def _sweep(engine: Any, interval_s: float) -> None:
    """Have the engine drop what has expired, also while it has nothing to do."""
    while True:
        await asyncio.sleep(interval_s)
        try:
            await engine_rpc.call(engine, "sweep")
        except Exception as error:
            # The engine may be busy going down; the server reports that itself.
            logger.debug("Sweep failed: %s", error)
