"""What an operator asks of a running server at its ``/cachescope`` paths.

==============================  =================================================================
``GET /cachescope/health``      the state of each tier, for anyone; to the operator also where it
                                is, what is wrong with it, and who holds most of it
``GET /cachescope/breaks``      the latest breaks: the caller's organisation's, everyone's to the
                                operator
``POST /cachescope/purge``      forget the entries of an organisation or a session on every tier:
                                the caller's own, anyone's for the operator
==============================  =================================================================

The operator is who presents `Config.operator_token` as an API key.
"""

import hmac
import json
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse

from vllm_cachescope.api.diagnoser import BreakLog
from vllm_cachescope.config import Config
from vllm_cachescope.logs import logger_of
from vllm_cachescope.tenancy.caller import ANONYMOUS, CallerDirectory, api_key
from vllm_cachescope.tenancy.owner_tags import EVERYONE, OwnerTags
from vllm_cachescope.tenancy.scope import short_name

logger = logger_of(__name__)

BREAKS = "/cachescope/breaks"
HEALTH = "/cachescope/health"
PURGE = "/cachescope/purge"
PATHS = (BREAKS, HEALTH, PURGE)

_METHODS = {BREAKS: "GET", HEALTH: "GET", PURGE: "POST"}

_FOR_ALL = ("name", "up", "readable", "writable", "used_bytes", "capacity_bytes")
"""What everyone may know of a tier."""


@dataclass(slots=True)
class Purged:
    """What became of a purge.

    Attributes:
        entries: how many entries each tier has lost, over all engines.
        unreached: the tiers that may still hold some, with the reason.
    """

    entries: dict[str, int] = field(default_factory=dict)
    unreached: dict[str, str] = field(default_factory=dict)


class Engines(ABC):
    """The engines behind the server, as operations see them."""

    @abstractmethod
    async def health(self) -> list[list[dict[str, Any]]]:
        """Return the state of each tier of each engine.

        Raises:
            TimeoutError: if an engine does not answer.
        """

    @abstractmethod
    async def purge(self, prefix: bytes) -> Purged:
        """Forget all entries whose owner begins with ``prefix`` (see `owners`), on every tier.

        Raises:
            TimeoutError: if an engine does not answer.
        """


class Answer(JSONResponse):
    """JSON in ASCII: names that a client made up may hold half a surrogate pair, which can be
    escaped and not encoded."""

    def render(self, content: Any) -> bytes:
        """Return the body."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


class Refused(Exception):
    """A request for an operation that is wrong, or not the caller's to make."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind


class Operations:
    """Answers requests for operations.

    Args:
        config: the configuration.
        directory: who is who.
        breaks: the breaks.
        engines: the engines.
    """

    def __init__(
        self, config: Config, directory: CallerDirectory, breaks: BreakLog, engines: Engines
    ) -> None:
        self._operator_token = config.operator_token
        self._directory = directory
        self._owners = OwnerTags(config.secret_bytes())
        self._breaks = breaks
        self._engines = engines

    async def answer(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        is_known: bool,
        read_body: Callable[[], Awaitable[bytes]],
    ) -> Answer:
        """Return the response to a request.

        Args:
            method: its method.
            path: its path, which ends with one of `PATHS`.
            headers: its headers, names in lower case, each character a byte.
            is_known: whether the server itself would let the caller in.
            read_body: reads its body.
        """
        operation = next(known for known in PATHS if path.endswith(known))
        if method != _METHODS[operation]:
            refused = Refused(405, "invalid_request_error", f"use {_METHODS[operation]}")
            return _refusal(refused, {"allow": _METHODS[operation]})
        org = None
        if not (is_operator := self._is_operator(headers)):
            org = self._directory.caller(headers, None).org if is_known else None
        try:
            if operation == HEALTH:
                return await self._health(is_operator)
            if not is_operator and not is_known:
                raise Refused(401, "authentication_error", "unknown API key")
            if operation == BREAKS:
                breaks = [seen.to_dict(is_operator) for seen in self._breaks.recent(org)]
                return Answer({"breaks": breaks})
            return await self._purge(await read_body(), org)
        except Refused as refused:
            return _refusal(refused)
        except TimeoutError:
            return _refusal(Refused(503, "api_error", "the engine does not answer"))

    def _is_operator(self, headers: Mapping[str, str]) -> bool:
        token, presented = self._operator_token, api_key(headers)
        if token is None or presented is None:
            return False
        # A header's characters are the bytes that came.
        return hmac.compare_digest(token.get_secret_value().encode(), presented.encode("latin-1"))

    async def _health(self, is_operator: bool) -> Answer:
        """Answer 200 whatever the tiers' state is: without them requests run all the same."""
        try:
            engines = await self._engines.health()
        except TimeoutError:
            return Answer({"status": "degraded", "reason": "the engine does not answer"})
        names = self._names() if is_operator else {}
        tiers = [
            {"engine": engine} | _shown(tier, is_operator, names)
            for engine, tiers in enumerate(engines)
            for tier in tiers
        ]
        well = all(t["up"] and t.get("readable", True) and t.get("writable", True) for t in tiers)
        return Answer({"status": "ok" if well else "degraded", "tiers": tiers})

    def _names(self) -> dict[str, str]:
        """Return the organisations that are known here by their tags in hex."""
        orgs = {ANONYMOUS, EVERYONE, *self._directory.named_orgs(), *self._breaks.orgs()}
        return {self._owners.prefix(org).hex(): org for org in orgs}

    async def _purge(self, raw: bytes, caller_org: str | None) -> Answer:
        """Purge what the body says.

        Args:
            raw: the body.
            caller_org: whose request it is; None for the operator's.
        """
        body = _purge_body(raw)
        session = short_name(body["session"]) if "session" in body else None
        orgs = self._purged_orgs(body, caller_org)
        purged = Purged()
        for prefix in [self._owners.prefix(org, session) for org in orgs] or [b""]:
            done = await self._engines.purge(prefix)
            for tier, entries in done.entries.items():
                purged.entries[tier] = purged.entries.get(tier, 0) + entries
            purged.unreached |= done.unreached
        everyone: list[str | None] = [None]
        requests = sum(self._breaks.forget(org, session) for org in orgs or everyone)
        what = " and ".join(orgs) or "everything"
        logger.info(
            "Purged %s for %s: %s entries",
            f"session {session!r} of {what}" if session else what,
            caller_org or "the operator",
            purged.entries,
        )
        for tier, reason in purged.unreached.items():
            logger.warning("The purge did not reach tier %s: %s", tier, reason)
        answer = {
            "orgs": orgs or None,
            "session": session,
            "purged": purged.entries,
            "fingerprints": requests,
            "unreached": purged.unreached,
        }
        return Answer(answer, 502 if purged.unreached else 200)

    def _purged_orgs(self, body: Mapping[str, Any], caller_org: str | None) -> list[str]:
        """Return the organisations that ``body`` means; none for everything."""
        if body.get("all"):
            if caller_org is not None:
                raise _not_the_operator("everything")
            return []
        if (name := body.get("org")) is None:
            orgs = [ANONYMOUS if caller_org is None else caller_org]
        elif not (orgs := self._directory.named(name)):
            raise Refused(
                404,
                "not_found_error",
                f"org: {name!r} is no organisation; allowed: a name in tenants, or an id as "
                "GET /cachescope/breaks shows it",
            )
        if caller_org is None:
            return orgs
        if caller_org == ANONYMOUS:
            # What everyone without a key shares is nobody's own.
            raise Refused(
                401,
                "authentication_error",
                "present the operator token, or the API key whose entries are to be forgotten",
            )
        if caller_org not in orgs:
            raise _not_the_operator(f"of {name!r}; this key is of {caller_org}")
        return [caller_org]


def _purge_body(raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        body = None
    allowed = (
        'allowed: {"all": true}, {"org": NAME}, {"session": ID} or {"org": NAME, "session": ID}'
    )
    if not isinstance(body, dict):
        raise Refused(400, "invalid_request_error", f"the body is not a JSON object; {allowed}")
    whole = body == {"all": True} and body["all"] is True
    named = body.keys() and body.keys() <= {"org", "session"}
    if not whole and not (named and all(isinstance(v, str) and v for v in body.values())):
        raise Refused(400, "invalid_request_error", f"the body does not say what; {allowed}")
    if body.get("org") == EVERYONE and "session" in body:
        raise Refused(
            400, "invalid_request_error", f"session: what is {EVERYONE} belongs to no session"
        )
    return body


def _not_the_operator(what: str) -> Refused:
    return Refused(
        403,
        "permission_error",
        f"only who presents the operator token (operator_token in the configuration) may purge "
        f"entries {what}",
    )


def _refusal(refused: Refused, headers: dict[str, str] | None = None) -> Answer:
    error = {"type": refused.kind, "message": str(refused)}
    return Answer({"type": "error", "error": error}, refused.status, headers)


def _shown(tier: Mapping[str, Any], is_operator: bool, names: Mapping[str, str]) -> dict[str, Any]:
    """Return what may be known of a tier."""
    if not is_operator:
        return {key: tier[key] for key in _FOR_ALL if key in tier}
    shown = dict(tier)
    if "orgs" in tier:
        shown["orgs"] = {names.get(tag, tag): held for tag, held in tier["orgs"].items()}
    return shown
