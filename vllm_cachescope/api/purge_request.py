"""A request for a purge, and whether its caller may make it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_cachescope.api.answers import Refused
from vllm_cachescope.tenancy.caller import ANONYMOUS, CallerDirectory
from vllm_cachescope.tenancy.owner_tags import EVERYONE
from vllm_cachescope.tenancy.scope import short_name


@dataclass(frozen=True, slots=True)
class PurgeRequest:
    """A purge that its caller may ask for.

    Attributes:
        orgs: ids of the organisations whose entries are to be purged; none for all entries.
        session: the one session to purge; None for all sessions of these organisations.
    """

    orgs: list[str]
    session: str | None

    def __str__(self) -> str:
        """Return what is purged, in words."""
        orgs = " and ".join(self.orgs) or "everything"
        return f"session {self.session!r} of {orgs}" if self.session else orgs

    @classmethod
    def read(cls, raw: bytes, caller_org: str | None, directory: CallerDirectory) -> "PurgeRequest":
        """Return the purge that a body asks for.

        Args:
            raw: the body: ``{"all": true}``, or an object with ``org``, ``session`` or both.
            caller_org: whose request it is; None for the operator's.
            directory: the organisations.

        Raises:
            Refused: if the body is none of these, or the caller may not ask for that.
        """
        body = _parse(raw)
        session = short_name(body["session"]) if "session" in body else None
        return cls(_orgs(body, caller_org, directory), session)


def _parse(raw: bytes) -> dict[str, Any]:
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


def _orgs(body: Mapping[str, Any], caller_org: str | None, directory: CallerDirectory) -> list[str]:
    name = body.get("org")
    if caller_org is None:
        return _named(body, directory)
    if body.get("all"):
        raise _not_the_operator(caller_org, "everything", directory)
    if name is not None and caller_org not in directory.named(name):
        # Whether there is such an organisation is not the caller's to know.
        raise _not_the_operator(caller_org, f"entries of {name!r}", directory)
    if caller_org == ANONYMOUS:
        # What everyone without a key shares is nobody's own.
        raise Refused(
            401,
            "authentication_error",
            "present the operator token, or the API key whose entries are to be forgotten",
        )
    return [caller_org]


def _named(body: Mapping[str, Any], directory: CallerDirectory) -> list[str]:
    """Return the organisations that the operator names; none for everything."""
    if body.get("all"):
        return []
    if not (orgs := directory.named(name := body.get("org", ANONYMOUS))):
        raise Refused(
            404,
            "not_found_error",
            f"org: {name!r} is no organisation; allowed: a name in tenants, or an id as "
            "GET /cachescope/health (orgs) and GET /cachescope/breaks list them",
        )
    return orgs


def _not_the_operator(caller_org: str, what: str, directory: CallerDirectory) -> Refused:
    if caller_org != ANONYMOUS and directory.is_listed(caller_org):
        return Refused(
            403,
            "permission_error",
            f"only the operator may purge {what}; this key is of {caller_org}",
        )
    return Refused(
        401,
        "authentication_error",
        f"only the operator may purge {what}: present operator_token of the configuration as the "
        "bearer token; what was presented is another, or nothing",
    )
