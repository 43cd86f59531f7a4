"""The middleware of vLLM's API server: attached to it, or named with ``--middleware``."""

import asyncio
import atexit
import secrets
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from vllm import envs

from vllm_cachescope.api import parsed_body
from vllm_cachescope.api.engines import Engines, Purged
from vllm_cachescope.api.middleware import CacheScopeMiddleware
from vllm_cachescope.api.peers import Peers
from vllm_cachescope.api.services import Server, directory_of
from vllm_cachescope.config import Config
from vllm_cachescope.connectors.vllm import config_check, engine_rpc, local_notes, shm_regions
from vllm_cachescope.connectors.vllm.api_server.admission import Admission
from vllm_cachescope.connectors.vllm.api_server.tracing import Tracer
from vllm_cachescope.connectors.vllm.store_factory import keeps_purge_log, note_stores
from vllm_cachescope.logs import logger_of
from vllm_cachescope.tiers.keyspace import secret_digest
from vllm_cachescope.tiers.purges import PURGE_S

ANSWER_S = 10.0
"""How long an engine may take to answer a command, in seconds: longer than a long step."""

HEED_S = 0.5
"""How often an engine is asked what others have purged, in seconds."""

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
    tracer = Tracer.installed(client.vllm_config)
    admission = Admission(state, config, config.secret_bytes(), directory, tracer)
    # vLLM kills its engine without letting it clean up. When this process ends, which does the
    # killing, the engine is gone.
    atexit.register(shm_regions.remove_stale)
    parallel = client.vllm_config.parallel_config
    peers = Peers(parallel._api_process_count, max(0, parallel._api_process_rank))
    replica = _replica(config, state.args)
    shares_purges = any(map(keeps_purge_log, config.tiers))
    engines = EngineProcesses(client, replica, peers.count > 1 or shares_purges)
    # A task that nothing refers to would be collected.
    loop = asyncio.get_running_loop()
    state.cachescope_sweeper = loop.create_task(engines.sweep_every(config.sweep_interval))
    state.cachescope_listener = loop.create_task(engines.heed_every(HEED_S))
    parsed_body.install()
    tools_behind = loop.create_task(admission.renders_tools_behind_system())
    notes = note_stores(
        config.tiers,
        secret_digest(config.secret_bytes()),
        time.monotonic,
        local_notes.claim if peers.count > 1 else None,
    )
    if peers.count > 1 and peers.rank == 0:
        logger.info(
            "This server has %d API processes. Each lists only the breaks among the requests that "
            "it has served itself; what these left in the cache all of them know.",
            peers.count,
        )
    return Server(
        config,
        model_name=client.vllm_config.model_config.served_model_name,
        block_tokens=int(client.vllm_config.cache_config.block_size),
        api_keys=api_keys,
        engines=engines,
        purge_renderings=admission.purge_renderings,
        tools_behind_system=lambda: tools_behind.result() if tools_behind.done() else None,
        peers=peers,
        replica=replica,
        trace=None if tracer is None else tracer.send,
        takes_parsed=True,
        note_stores=notes,
    )


def _replica(config: Config, arguments: Any) -> str:
    """Return the server's name among others: host name and port unless it is configured."""
    if config.ledger is not None and config.ledger.replica is not None:
        return config.ledger.replica
    return f"{socket.gethostname()}:{arguments.port}"


class EngineProcesses(Engines):
    """The engine processes behind vLLM's engine client.

    Args:
        client: the engine client.
        name: what an operator knows the server by.
        has_others: whether anyone else may purge: another API process, or another replica.
    """

    def __init__(self, client: Any, name: str, has_others: bool) -> None:
        self._client = client
        self._name = name
        self._has_others = has_others
        self._forget: Callable[[str | None, str | None], object] = lambda org, session: None
        self._note_evictions: Callable[[Sequence[tuple[str, str, bytes, int]]], object] | None
        self._note_evictions = None
        # Ids of the purges of this process that it has not heard of yet.
        self._own_purges: set[str] = set()

    def on_purge(self, forget: Callable[[str | None, str | None], object]) -> None:
        self._forget = forget

    def on_evictions(self, note: Callable[[Sequence[tuple[str, str, bytes, int]]], object]) -> None:
        self._note_evictions = note

    async def sweep_every(self, interval_s: float) -> None:
        """Have the engines drop what has expired, also while they have nothing to do."""
        while True:
            await asyncio.sleep(interval_s)
            try:
                await engine_rpc.call(self._client, "sweep")
                if self._note_evictions is not None:
                    for counted in await engine_rpc.call(self._client, "evictions"):
                        self._note_evictions(counted)
            except Exception as error:
                # The engine may be busy going down; the server reports that itself.
                logger.debug("Sweep failed: %s", error)

    async def heed_every(self, interval_s: float) -> None:
        """Have the engines carry out what other replicas have purged, also while they have nothing
        to do, and forget here what others have purged."""
        heard = 0
        while self._has_others:
            await asyncio.sleep(interval_s)
            try:
                # Each purge goes to all engines: any of them knows of it.
                purges, *_ = await engine_rpc.call(self._client, "heed", self._name, heard)
            except Exception as error:
                logger.debug("Purges of others are not known: %s", error)
                continue
            for number, purge_id, org, session in purges:
                heard = number
                if purge_id in self._own_purges:
                    self._own_purges.remove(purge_id)
                else:
                    self._forget(org, session)

    async def health(self) -> list[list[dict[str, Any]]]:
        """Return the state of each tier of each engine process.

        Raises:
            TimeoutError: if an engine does not answer within `ANSWER_S`.
        """
        return await self._call("health")

    async def purge(
        self, prefix: bytes, org: str | None = None, session: str | None = None
    ) -> Purged:
        """Purge in each engine process; wait until the remote tiers are done as well.

        Raises:
            TimeoutError: if an engine does not answer within `ANSWER_S`, or a remote tier is not
                done within twice `PURGE_S`.
        """
        purge_id = secrets.token_hex(8)
        if self._has_others:
            self._own_purges.add(purge_id)
        entries: Counter[str] = Counter()
        for local in await self._call("purge", prefix, purge_id, org, session):
            entries.update(local)
        purged = Purged()
        end = time.monotonic() + 2 * PURGE_S
        pause_s = 0.01
        while None in (answers := await self._call("purged", purge_id)):
            if time.monotonic() > end:
                raise TimeoutError("the purge does not end")
            await asyncio.sleep(pause_s)
            pause_s = min(0.5, 2 * pause_s)
        for answer in answers:
            for tier, (deleted, reason) in answer["tiers"].items():
                entries[tier] += deleted
                if reason is not None:
                    purged.unreached[tier] = reason
            purged.add(Purged({}, {}, set(answer["confirmed"]), answer["missing"]))
        purged.entries = dict(entries)
        return purged

    async def _call(self, command: str, *args: Any) -> list[Any]:
        return await asyncio.wait_for(engine_rpc.call(self._client, command, *args), ANSWER_S)
