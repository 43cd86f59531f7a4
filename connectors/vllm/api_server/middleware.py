"""The middleware that ``--middleware`` of vLLM's API server names."""

import asyncio
import atexit
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from vllm import envs

from vllm_cachescope.api.middleware import CacheScopeMiddleware
from vllm_cachescope.api.operations import Engines, Purged
from vllm_cachescope.config import Config
from vllm_cachescope.connectors.vllm import config_check, engine_rpc, shm_regions
from vllm_cachescope.connectors.vllm.api_server.admission import Admission
from vllm_cachescope.logs import logger_of
from vllm_cachescope.tiers.remote import PURGE_S

ANSWER_S = 10.0
"""How long an engine may take to answer a command, in seconds: a long step of it, and more."""

logger = logger_of(__name__)


class Middleware(CacheScopeMiddleware):
    """CacheScope's API side, attached to vLLM's engine client."""

    def attach(self, state: Any) -> Config:
        config = config_check.read(state.engine_client.vllm_config.kv_transfer_config)
        self._admission = Admission(state, config, config.secret_bytes())
        # vLLM kills its engine without letting it clean up; by the end of this process, which
        # does the killing, the engine is gone.
        atexit.register(shm_regions.remove_stale)
        self._sweeper = asyncio.get_running_loop().create_task(
            _sweep(state.engine_client, config.sweep_interval)
        )
        return config

    def block_tokens(self, state: Any) -> int:
        return int(state.engine_client.vllm_config.cache_config.block_size)

    def engines(self, state: Any) -> Engines:
        return EngineProcesses(state.engine_client, self._admission.forget)

    def server_keys(self, state: Any) -> Iterable[str]:
        return [key for key in (state.args.api_key or [envs.VLLM_API_KEY]) if key]


class EngineProcesses(Engines):
    """The engine processes behind vLLM's engine client.

    Args:
        client: the engine client.
        forget: forgets what this process keeps of prompts.
    """

    def __init__(self, client: Any, forget: Callable[[], None]) -> None:
        self._client = client
        self._forget = forget

    async def health(self) -> list[list[dict[str, Any]]]:
        return await self._call("health")

    async def purge(self, prefix: bytes) -> Purged:
        # Whose a rendered prompt was is not kept, and it is soon rendered again: all of them go.
        self._forget()
        purge_id = secrets.token_hex(8)
        entries: Counter[str] = Counter()
        for lost in await self._call("purge", prefix, purge_id):
            entries.update(lost)
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
