"""The operations of a running server, at its ``/cachescope`` paths.

==============================  =================================================================
``GET /cachescope/health``      the state of each tier, for anyone; to the operator also the
                                tier's address, what is wrong with it, and who holds most of it
``GET /cachescope/breaks``      the latest breaks: the caller's organisation's, everyone's to the
                                operator
``GET /cachescope/usage``       what was used: by the caller's organisation, by everyone to the
                                operator; see `usage_endpoint`
``POST /cachescope/purge``      drop the entries of an organisation or a session on every tier:
                                the caller's own, within `purge_budget`; anyone's for the operator
``DELETE /cachescope/sessions/NAME``
                                say that a session of the caller's organisation is over: its
                                blocks in the CPU tier are evicted first, and can be read until
                                then; the operator names the organisation, ``?org=NAME``
==============================  =================================================================

The operator is whoever presents `Config.operators_token` as an API key.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from math import ceil
from operator import itemgetter
from typing import Any

from pydantic_core import to_json
from starlette.responses import Response

from vllm_cachescope.api.answers import Answer, Refused
from vllm_cachescope.api.diagnoser import Diagnoser
from vllm_cachescope.api.engines import Engines, Purged
from vllm_cachescope.api.purge_budget import BURST, PER_SECOND, PurgeBudget
from vllm_cachescope.api.purge_request import PurgeRequest
from vllm_cachescope.api.viewer import presents
from vllm_cachescope.config import Config
from vllm_cachescope.diagnosis.outcome import ANOTHER_REPLICA
from vllm_cachescope.logs import logger_of
from vllm_cachescope.tenancy.caller import ANONYMOUS, UNLISTED, CallerDirectory
from vllm_cachescope.tenancy.owner_tags import EVERYONE, UNLISTED_TAG, OwnerTags

logger = logger_of(__name__)

BREAKS = "/cachescope/breaks"
HEALTH = "/cachescope/health"
PURGE = "/cachescope/purge"
USAGE = "/cachescope/usage"
SESSIONS = "/cachescope/sessions/"
PATHS = (BREAKS, HEALTH, PURGE, USAGE)

_METHODS = {BREAKS: "GET", HEALTH: "GET", PURGE: "POST", USAGE: "GET", SESSIONS: "DELETE"}

LISTED = 100
"""How many breaks are listed."""

_FOR_ALL = ("name", "up", "readable", "writable", "used_bytes", "capacity_bytes")
"""The fields of a tier's health that everyone may see."""


def operation_of(path: str) -> str | None:
    """Return which operation a path stands for, one of `PATHS` or `SESSIONS`; None if for none."""
    if session_in(path):
        return SESSIONS
    return next((known for known in PATHS if path.endswith(known)), None)


def session_in(path: str) -> str:
    """Return the session that a path below `SESSIONS` names; empty if it names none."""
    return path.partition(SESSIONS)[2]


class Operations:
    """Answers requests for operations.

    Args:
        config: the configuration.
        directory: the organisations and what their clients present.
        diagnoser: keeps what is known of requests, and their breaks.
        engines: the engines.
        forget: drops what this process knows of an organisation, or of a session of it (with None
            of everyone), and returns how many requests that were.
        clock: seconds, never running backwards.
        usage: answers the fields of a query of the ledger, for an organisation (None for the
            operator); None where no ledger is kept.
        elsewhere: returns what is known of so many breaks of an organisation (None for everyone's)
            on other replicas, the newest; None where no ledger is shared.
    """

    def __init__(
        self,
        config: Config,
        directory: CallerDirectory,
        diagnoser: Diagnoser,
        engines: Engines,
        forget: Callable[[str | None, str | None], int],
        clock: Callable[[], float],
        usage: Callable[[Mapping[str, str], str | None], Awaitable[Response]] | None = None,
        elsewhere: Callable[[str | None, int], Awaitable[list[dict[str, Any]]]] | None = None,
    ) -> None:
        self._elsewhere = elsewhere
        self._usage = usage
        self._operator_token = config.operators_token()
        self._shows_replicas = config.show_replicas
        self._directory = directory
        self._tags = OwnerTags(config.secret_bytes())
        self._diagnoser = diagnoser
        self._engines = engines
        self._forget = forget
        self._budget = PurgeBudget(clock)

    async def answer(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        is_known: bool,
        read_body: Callable[[], Awaitable[bytes]],
        fields: Mapping[str, str] | None = None,
    ) -> Response:
        """Return the response to a request.

        Args:
            method: its method.
            path: its path, which stands for an operation.
            headers: its headers, names in lower case, each character a byte.
            is_known: whether the server itself would let the caller in.
            read_body: reads its body.
            fields: the fields of its query.
        """
        operation = operation_of(path)
        assert operation is not None
        is_operator = presents(self._operator_token, headers)
        org = None
        if not is_operator and is_known:
            org = self._directory.caller(headers, None).org
        try:
            if method != (allowed := _METHODS[operation]):
                message = f"use {allowed}"
                raise Refused(405, "invalid_request_error", message, {"allow": allowed})
            if operation == HEALTH:
                return await self._health(is_operator)
            if not is_operator and not is_known:
                raise Refused(
                    401, "authentication_error", "this server does not know the API key presented"
                )
            if operation == BREAKS:
                return Answer(await self._listed(org, is_operator))
            if operation == USAGE:
                return await self._used(fields or {}, org)
            if operation == SESSIONS:
                return await self._end_session(session_in(path), fields or {}, org)
            request = PurgeRequest.read(await read_body(), org, self._directory)
            if org is not None:
                self._charge(org)
            return await self._purge(request, org)
        except Refused as refused:
            return refused.answer()
        except TimeoutError:
            return Refused(503, "api_error", "the engine does not answer").answer()

    async def _listed(self, org: str | None, is_operator: bool) -> dict[str, Any]:
        breaks = self._diagnoser.breaks.recent(org, LISTED)
        listed = [seen.to_dict(is_operator, self._shows_replicas) for seen in breaks]
        if self._elsewhere is not None:
            others = await self._elsewhere(org, LISTED)
            if not (is_operator or self._shows_replicas):
                others = [{**other, "replica": ANOTHER_REPLICA} for other in others]
            listed = sorted([*listed, *others], key=itemgetter("at"), reverse=True)[:LISTED]
        return {"breaks": listed} | self._diagnoser.peers.to_dict()

    async def _used(self, fields: Mapping[str, str], org: str | None) -> Response:
        if self._usage is None:
            raise Refused(
                404,
                "not_found_error",
                "this server keeps no ledger; its operator can set ledger.directory or ledger.url",
            )
        return await self._usage(fields, org)

    async def _end_session(
        self, name: str, fields: Mapping[str, str], caller_org: str | None
    ) -> Answer:
        """Have the blocks of a session evicted first."""
        body = {"session": name} | ({"org": fields["org"]} if "org" in fields else {})
        request = PurgeRequest.read(to_json(body), caller_org, self._directory)
        if caller_org is not None:
            self._charge(caller_org)
        owners = [
            owner for org in request.orgs for owner in self._tags.prefixes(org, request.session)
        ]
        blocks = await self._engines.end_session(owners)
        return Answer({"orgs": request.orgs, "session": request.session, "blocks": blocks})

    async def _health(self, is_operator: bool) -> Answer:
        """Answer 200 whatever state the tiers are in: without them requests run all the same."""
        try:
            engines = await self._engines.health()
        except TimeoutError:
            return Answer(health_of(None))
        orgs = self._orgs_by_tag() if is_operator else None
        return Answer(health_of(dict(enumerate(engines)), orgs))

    def _orgs_by_tag(self) -> dict[str, str]:
        """Return the organisations that are known here by their tags in hex."""
        orgs = {ANONYMOUS, EVERYONE, *self._directory.named_orgs(), *self._diagnoser.orgs()}
        by_tag = {tag.hex(): org for org in orgs for tag in self._tags.prefixes(org)}
        return by_tag | {UNLISTED_TAG.hex(): UNLISTED}

    def _charge(self, org: str) -> None:
        """Take a purge out of the budget of an organisation.

        Raises:
            Refused: if there is none left.
        """
        if wait_s := self._budget.take(self._directory.account(org)):
            raise Refused(
                429,
                "rate_limit_error",
                f"an organisation may purge {BURST} times at once and {PER_SECOND:g} times a "
                "second after that; purge the organisation instead of its sessions, or later",
                {"retry-after": str(ceil(wait_s))},
            )

    async def _purge(self, request: PurgeRequest, caller_org: str | None) -> Answer:
        orgs, session = request.orgs, request.session
        purged = Purged()
        everyone: list[str | None] = [None]
        for org in orgs or everyone:
            for prefix in [b""] if org is None else self._tags.prefixes(org, session):
                purged.add(await self._engines.purge(prefix, org, session))
        requests = sum(self._forget(org, session) for org in orgs or everyone)
        if (reason := await self._diagnoser.purged()) is not None:
            purged.unreached["notes on sessions"] = reason
        by = caller_org or "the operator"
        logger.info("Purged %s for %s: %s entries", request, by, purged.entries)
        for tier, reason in purged.unreached.items():
            logger.warning("The purge did not reach tier %s: %s", tier, reason)
        for replica, reason in purged.missing.items():
            logger.warning("The purge may not have reached replica %s: %s", replica, reason)
        answer = {
            "orgs": orgs or None,
            "session": session,
            "purged": purged.entries,
            "fingerprints": requests,
            "unreached": purged.unreached,
            "replicas": _replicas(purged, caller_org is None or self._shows_replicas),
        }
        return Answer(answer, 200 if purged.is_whole else 502)


def _replicas(purged: Purged, by_name: bool) -> dict[str, Any]:
    """Return which other replicas have purged as well, or how many."""
    if by_name:
        return {"confirmed": sorted(purged.confirmed), "missing": purged.missing}
    return {"confirmed": len(purged.confirmed), "missing": len(purged.missing)}


def health_of(
    engines: Mapping[int, Sequence[Mapping[str, Any]]] | None,
    orgs: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return what is said of the health of engines.

    Args:
        engines: the state of each tier by the engine's rank; None if an engine does not answer.
        orgs: the organisations by their tags in hex, for the operator; None for anyone else.
    """
    if engines is None:
        return {"status": "degraded", "reason": "the engine does not answer"}
    tiers = [
        {"engine": engine} | _shown(tier, orgs) for engine, held in engines.items() for tier in held
    ]
    well = all(t["up"] and t.get("readable", True) and t.get("writable", True) for t in tiers)
    return {"status": "ok" if well else "degraded", "tiers": tiers}


def _shown(tier: Mapping[str, Any], orgs: Mapping[str, str] | None) -> dict[str, Any]:
    """Return what the caller may know of a tier, organisations by their ids."""
    if orgs is None:
        return {key: tier[key] for key in _FOR_ALL if key in tier}
    shown = dict(tier)
    if "orgs" in tier:
        shown["orgs"] = {orgs.get(tag, tag): held for tag, held in tier["orgs"].items()}
    return shown
