"""The services of the API side, put together once, when the server behind it is known."""

import hmac
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY, CollectorRegistry

from vllm_cachescope.api.diagnoser import Diagnoser
from vllm_cachescope.api.diffs import Diffs
from vllm_cachescope.api.endings import Endings
from vllm_cachescope.api.engines import Engines
from vllm_cachescope.api.ignored_markers import IgnoredMarkers
from vllm_cachescope.api.mending import Mender
from vllm_cachescope.api.operations import Operations
from vllm_cachescope.api.page import REQUESTS, Page
from vllm_cachescope.api.peers import ALONE, Peers
from vllm_cachescope.api.poll_filter import leave_out
from vllm_cachescope.api.recorder import Recorder, Trace
from vllm_cachescope.api.request_details import RequestDetails
from vllm_cachescope.api.session_exchange import SessionExchange
from vllm_cachescope.api.stage_times import StageTimes
from vllm_cachescope.api.tokenized_counts import TokenizedCounts
from vllm_cachescope.api.viewer import Viewer, viewer_of
from vllm_cachescope.cache.runs import Ended
from vllm_cachescope.config import Config
from vllm_cachescope.logs import logger_of
from vllm_cachescope.metrics import NO_ENGINE, QUEUED_DIAGNOSES
from vllm_cachescope.registration import gauge
from vllm_cachescope.repair.repairer import Repairer
from vllm_cachescope.tenancy.caller import CallerDirectory, api_key
from vllm_cachescope.tenancy.org_labels import OrgLabels
from vllm_cachescope.tenancy.owner_tags import OwnerTags
from vllm_cachescope.tiers.note_store import NoteStore
from vllm_cachescope.usage.prices import Prices, read_prices
from vllm_cachescope.usage.recent_requests import RecentRequests
from vllm_cachescope.usage.request_memory import RequestMemory

if TYPE_CHECKING:
    from vllm_cachescope.api.ledger_service import LedgerService

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
        registry: where its metrics are.
        peers: its API processes, of which this is one.
        replica: its name among the servers of one operator.
        trace: sends the trace of a request that is over; None where the server traces nothing.
        tools_behind_system: whether its chat template renders tools behind the system prompt; None
            while that is not known.
        takes_parsed: whether it takes the object of a large body in place of JSON, which
            `parsed_body.install` has seen to.
        note_stores: makes the store of notes on sessions that it shares with other servers; None
            if it shares none.
    """

    config: Config
    model_name: str
    block_tokens: int
    api_keys: Collection[str]
    engines: Engines
    purge_renderings: Callable[[str | None, str | None], None]
    registry: CollectorRegistry = REGISTRY
    peers: Peers = ALONE
    replica: str = ""
    trace: Trace | None = None
    tools_behind_system: Callable[[], bool | None] = lambda: None
    takes_parsed: bool = False
    note_stores: Callable[[], NoteStore] | None = None


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
        mender: puts right what would break a prefix without need.
        operations: answers what an operator asks.
        ignored_markers: counts the markers that requests are served without.
        stage_times: counts what caching itself takes of requests.
        tokenized: counts tokens of prompts by whether they were known.
        count_queued: notes that so many more requests wait to be diagnosed.
        recorder: makes the records of the requests that are over.
        endings: tells the engines how answers ended; None where their policy does not ask.
        page: the page; None where it is off.
        operator_token: makes its holder the operator; None for nobody.
        takes_parsed: whether the server takes the object of a large body in place of JSON.
    """

    config: Config
    api_keys: Collection[str]
    directory: CallerDirectory
    diagnoser: Diagnoser
    mender: Mender
    operations: Operations
    ignored_markers: IgnoredMarkers
    stage_times: StageTimes
    tokenized: TokenizedCounts
    count_queued: Callable[[int], object]
    recorder: Recorder
    endings: Endings | None
    page: Page | None
    operator_token: bytes | None
    takes_parsed: bool

    @classmethod
    def of(cls, server: Server) -> "Services":
        """Return the services in front of ``server``.

        Raises:
            ConfigError: if the directory for diffs, the ledger's database or the file of prices
                cannot be used.
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
        details = RequestDetails(directory.account) if config.page else None
        exchange = None
        if server.note_stores is not None:
            exchange = SessionExchange(
                server.note_stores,
                secret,
                server.model_name,
                server.replica,
                directory.account,
                server.registry,
            )
        orgs = config.repair_of_orgs()
        repairer = Repairer(config.repair, orgs, time.monotonic, directory.account)
        endings = None
        if config.eviction.policy == "learned":
            engines = server.engines
            endings = Endings(engines.tell_endings, engines.end_session, OwnerTags(secret))
        diagnoser = Diagnoser(
            secret,
            server.block_tokens,
            diffs=diffs,
            registry=server.registry,
            model_name=server.model_name,
            account_of=directory.account,
            peers=server.peers,
            org_labels=OrgLabels(config.labelled_orgs(), secret),
            details=details,
            tools_behind_system=server.tools_behind_system,
            exchange=exchange,
            firsts=repairer.memory.told,
            tell_over=None if endings is None else partial(endings.note, ended=Ended.OVER),
        )
        if repairer.is_used and server.peers.count > 1 and server.peers.rank == 0:
            logger.warning(
                "Each of the %d API processes remembers first spellings and heads of sessions for "
                "itself: a session that changes from one to another is repaired by other ones",
                server.peers.count,
            )
        mender = Mender(repairer, config, server.registry, server.model_name, exchange)
        recorder = Recorder(server.model_name, server.replica)
        if server.trace is not None:
            recorder.trace_with(server.trace)
        prices = Prices() if config.prices is None else read_prices(config.prices)
        ledger = _ledger(server, directory, prices)
        if ledger is not None:
            recorder.add_sink(ledger.put)
        page, memory = None, RequestMemory(directory.account)
        if details is not None:
            requests: RecentRequests = memory
            peers = server.peers
            if ledger is not None and ledger.keeps_requests:
                requests, peers = ledger.requests, ALONE
            else:
                recorder.add_sink(lambda record, _: memory.add(record))
            shown = config.show_replicas
            name = server.model_name
            page = Page(requests, details, diffs, name, prices, peers, shows_replicas=shown)
            leave_out(REQUESTS)
            logger.info("The page is at /cachescope")

        def forget(org: str | None, session: str | None) -> int:
            server.purge_renderings(org, session)
            memory.purge(org, session)
            mender.purge(org, session)
            if ledger is not None:
                ledger.purge(org, session)
            return diagnoser.purge(org, session)

        server.engines.on_purge(forget)
        operations = Operations(
            config,
            directory,
            diagnoser,
            server.engines,
            forget,
            time.monotonic,
            None if ledger is None else ledger.answer,
            None if ledger is None else ledger.breaks_elsewhere,
        )
        queued = gauge(QUEUED_DIAGNOSES, server.registry)
        return cls(
            config,
            server.api_keys,
            directory,
            diagnoser,
            mender,
            operations,
            IgnoredMarkers(server.registry, server.model_name),
            StageTimes(server.registry, server.model_name),
            TokenizedCounts(server.registry, server.model_name),
            queued.labels(server.model_name, NO_ENGINE).inc,
            recorder,
            endings,
            page,
            config.operators_token(),
            server.takes_parsed,
        )

    def viewer(self, headers: Mapping[str, str]) -> Viewer:
        """Return who looks with these ``headers``.

        Raises:
            Refused: if the server does not know them.
        """
        known = self.is_known(headers)
        return viewer_of(headers, known, self.directory, self.operator_token)

    def is_known(self, headers: Mapping[str, str]) -> bool:
        """Tell whether the server will let a client with these ``headers`` in."""
        presented = api_key(headers) or ""
        # All of them, and each to its end: how long it takes tells nothing of a key.
        matches = [hmac.compare_digest(key.encode(), presented.encode()) for key in self.api_keys]
        return not self.api_keys or any(matches)


def _ledger(server: Server, directory: CallerDirectory, prices: Prices) -> "LedgerService | None":
    """Return the server's ledger; None if it keeps none.

    Raises:
        ConfigError: if the ledger's database cannot be used.
    """
    config = server.config
    if config.ledger is None:
        return None
    # Not above: it needs SQLAlchemy, which is not installed everywhere.
    from vllm_cachescope.api.ledger_service import LedgerService

    service = LedgerService(
        config.ledger,
        prices,
        directory,
        server.registry,
        server.model_name,
        server.replica,
        config.secret_bytes(),
        shows_replicas=config.show_replicas,
    )
    server.engines.on_evictions(service.put_evictions)
    return service
