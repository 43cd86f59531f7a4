"""The middleware that ``--middleware`` of vLLM's API server names."""

import asyncio
import atexit
import logging
from collections.abc import Iterable
from typing import Any

from vllm import envs

from vllm_cachescope.api.middleware import CacheScopeMiddleware
from vllm_cachescope.config import Config
from vllm_cachescope.connectors.vllm import commands, regions
from vllm_cachescope.connectors.vllm.admission import Admission
from vllm_cachescope.connectors.vllm.offloading import read_config

logger = logging.getLogger(__name__)


class Middleware(CacheScopeMiddleware):
    """CacheScope's API side, attached to vLLM's engine client."""

    def attach(self, state: Any) -> Config:
        config = read_config(state.engine_client.vllm_config)
        Admission(state, config, config.secret_bytes())
        # vLLM kills its engine without letting it clean up; by the end of this process, which
        # does the killing, the engine is gone.
        atexit.register(regions.remove_stale)
        self._sweeper = asyncio.get_running_loop().create_task(
            _sweep(state.engine_client, config.sweep_interval)
        )
        return config

    def block_tokens(self, state: Any) -> int:
        return int(state.engine_client.vllm_config.cache_config.block_size)

    def server_keys(self, state: Any) -> Iterable[str]:
        return [key for key in (state.args.api_key or [envs.VLLM_API_KEY]) if key]


async def _sweep(engine: Any, interval_s: float) -> None:
    """Have the engine drop what has expired, also while it has nothing to do."""
    while True:
        await asyncio.sleep(interval_s)
        try:
            await commands.call(engine, "sweep")
        except Exception as error:
            # The engine may be busy going down; the server reports that itself.
            logger.debug("Sweep failed: %s", error)
