"""The middleware of vLLM's API server: attached to it, or named with ``--middleware``."""

import asyncio
import atexit
import socket
import time
from functools import partial
from typing import Any

from vllm import envs

from vllm_cachescope.api import parsed_body
from vllm_cachescope.api.middleware import CacheScopeMiddleware
from vllm_cachescope.api.peers import Peers
from vllm_cachescope.api.services import Server, directory_of
from vllm_cachescope.config import Config
from vllm_cachescope.connectors.vllm import config_check, engine_rpc, local_notes, shm_regions
from vllm_cachescope.connectors.vllm.api_server.admission import Admission
from vllm_cachescope.connectors.vllm.api_server.tracing import Tracer
from vllm_cachescope.connectors.vllm.engine_processes import HEED_S, EngineProcesses
from vllm_cachescope.connectors.vllm.store_factory import keeps_purge_log, note_stores
from vllm_cachescope.logs import logger_of
from vllm_cachescope.tiers.keyspace import secret_digest

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
    call = partial(engine_rpc.call, client)
    engines = EngineProcesses(call, replica, peers.count > 1 or shares_purges)
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
