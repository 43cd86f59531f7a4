"""The services of the API side, put together once, when the server behind it is known."""

import hmac
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from prometheus_client import REGISTRY, CollectorRegistry

from vllm_cachescope.api.diagnoser import Diagnoser
from vllm_cachescope.api.diffs import Diffs
from vllm_cachescope.api.engines import Engines
from vllm_cachescope.api.ignored_markers import IgnoredMarkers
from vllm_cachescope.api.operations import Operations
from vllm_cachescope.api.peers import ALONE, Peers
from vllm_cachescope.config import Config
from vllm_cachescope.logs import logger_of
from vllm_cachescope.tenancy.caller import CallerDirectory, api_key

logger = logger_of(__name__)


@dataclass(frozen=True, slots=True)
class Server:
    """The server that the API side stands in front of.

    Attributes:
        config: the configuration that the server was started with.
        model_name: the model's name in the server's own metrics.
        block_tokens: tokens per block of its engines' caches.
        api_keys: the API keys that the server itself insists on; none if it lets anyone in.
        engines: the engines behind it.
        purge_renderings: drops what the server keeps of rendered prompts of an organisation, or of
            a session of it; with None, of everyone.
        tools_behind_system: whether its chat template renders tools behind the system prompt; None
            while that is not known.
        registry: where its metrics are.
        peers: its API processes, of which this is one.
    """

    config: Config
    model_name: str
    block_tokens: int
    api_keys: Collection[str]
    engines: Engines
    purge_renderings: Callable[[str | None, str | None], None]
    tools_behind_system: Callable[[], bool | None] = lambda: None
    registry: CollectorRegistry = REGISTRY
    peers: Peers = ALONE


def directory_of(config: Config, api_keys: Collection[str]) -> CallerDirectory:
    """Return the organisations that a server knows.

    Args:
        config: its configuration.
        api_keys: the API keys that it insists on; none if it lets anyone in.

    Raises:
        ConfigError: if the file of tenants cannot be used, or a writer is no organisation.
    """
    return CallerDirectory(
        config.secret_bytes(),
        config.tenant_names(),
        config.org_header,
        is_closed=bool(api_keys),
        global_writers=config.global_writer_ids(),
    )


@dataclass(frozen=True, slots=True)
class Services:
    """The services that all requests of one server use.

    Attributes:
        config: the configuration.
        api_keys: the API keys that the server insists on; none if it lets anyone in.
        directory: the organisations and what their clients present.
        diagnoser: diagnoses the requests.
        operations: answers what an operator asks.
        ignored_markers: counts the markers that requests are served without.
    """

    config: Config
    api_keys: Collection[str]
    directory: CallerDirectory
    diagnoser: Diagnoser
    operations: Operations
    ignored_markers: IgnoredMarkers

    @classmethod
    def of(cls, server: Server) -> "Services":
        """Return the services in front of ``server``.

        Raises:
            ConfigError: if the directory for diffs cannot be used.
        """
        config = server.config
        secret = config.secret_bytes()
        directory = directory_of(config, server.api_keys)
        if directory.anyone_writes_global:
            logger.info(
                "Any client may share as global, since no tenants are listed; see global_writers"
            )
        diffs = None
        if config.diffs is not None:
            diffs = Diffs(config.diffs, time.monotonic, directory.account)
        diagnoser = Diagnoser(
            secret,
            server.block_tokens,
            diffs=diffs,
            registry=server.registry,
            model_name=server.model_name,
            account_of=directory.account,
            peers=server.peers,
            tools_behind_system=server.tools_behind_system,
        )

        def forget(org: str | None, session: str | None) -> int:
            server.purge_renderings(org, session)
            return diagnoser.purge(org, session)

        server.engines.on_purge(forget)
        operations = Operations(
            config, directory, diagnoser, server.engines, forget, time.monotonic
        )
        ignored_markers = IgnoredMarkers(server.registry, server.model_name)
        return cls(config, server.api_keys, directory, diagnoser, operations, ignored_markers)

    def is_known(self, headers: Mapping[str, str]) -> bool:
        """Tell whether the server will let a client with these ``headers`` in."""
        presented = api_key(headers) or ""
        # All of them, and each to its end: how long it takes tells nothing of a key.
        matches = [hmac.compare_digest(key.encode(), presented.encode()) for key in self.api_keys]
        return not self.api_keys or any(matches)
