"""The caller of a request: an organisation, by its API key or a gateway, and a session, by name."""

import hashlib
import hmac
from collections.abc import Collection, Mapping

from vllm_cachescope.errors import BadRequest
from vllm_cachescope.tenancy.owner_tags import EVERYONE
from vllm_cachescope.tenancy.scope import Caller

ANONYMOUS = "anonymous"
"""The organisation of every request without an API key."""

UNLISTED = "unlisted"
"""The account of all organisations that anyone could have made up: those of API keys that neither
the operator lists nor the server insists on, and those of salts."""

SALT_TAG = "dynamo-cache-salt:"
"""What Dynamo writes in front of a tenant that it sends as a salt."""

SESSION_HEADERS = ("x-cachescope-session", "x-session-id", "x-claude-code-session-id")
"""Headers that name the session, first one wins. The second is the one vLLM itself reads."""


class CallerDirectory:
    """Finds the organisation and the session of a request.

    Args:
        secret: key of the hashes that stand for API keys without a name.
        names: names of organisations by the SHA-256 of their API keys, in hex.
        org_header: header, lower case, in which a trusted gateway names the organisation; None
            to trust no header.
        is_closed: whether the server lets only clients in whose API keys it was given.
        global_writers: ids of the organisations that may write what everyone shares; None for all
            that are listed, or for anyone where none are.
    """

    def __init__(
        self,
        secret: bytes,
        names: Mapping[str, str],
        org_header: str | None,
        is_closed: bool = False,
        global_writers: Collection[str] | None = None,
    ) -> None:
        self._secret = secret
        self._names = names
        self._org_header = org_header.lower() if org_header else None
        self._is_closed = is_closed
        self._global_writers = global_writers

    def caller(self, headers: Mapping[str, str], body_session: str | None) -> Caller:
        """Return who makes the request.

        Args:
            headers: the request's headers, names in lower case.
            body_session: the session its body names, which a header overrides.
        """
        session = next((s for name in SESSION_HEADERS if (s := headers.get(name))), body_session)
        return Caller(self._org(headers), session)

    def account(self, org: str) -> str:
        """Return who answers for what ``org`` takes up: `org` itself, or `UNLISTED`.

        Whoever may come with as many API keys as they like gains nothing by it.
        """
        made_up = org.startswith("salt:") or (org.startswith("key:") and not self._is_closed)
        return UNLISTED if made_up else org

    def is_listed(self, org: str) -> bool:
        """Whether ``org`` is an organisation that nobody can make up."""
        return self.account(org) == org

    @property
    def lists_nobody(self) -> bool:
        """Whether the operator has said nothing of who the organisations are."""
        return not (self._names or self._org_header or self._is_closed)

    @property
    def anyone_writes_global(self) -> bool:
        """Whether every client may write what everyone shares."""
        return self._global_writers is None and self.lists_nobody

    def may_write_global(self, org: str) -> bool:
        """Whether what ``org`` marks ``global`` is shared with everyone, and not with itself
        only."""
        if self._global_writers is not None:
            return org in self._global_writers
        return self.lists_nobody or (org != ANONYMOUS and self.is_listed(org))

    def of_name(self, name: str) -> str:
        """Return the id of the organisation that a trusted front end names; see `organisation`.

        Raises:
            BadRequest: if this is no organisation's name.
        """
        return organisation(name, self._names.values(), self._org_header)

    def of_salt(self, salt: str | None, is_trusted: bool = False) -> str:
        """Return the id of the organisation whose prompts have vLLM's ``cache_salt``; None is that
        of prompts without one.

        Args:
            salt: the salt, with or without a router's tag.
            is_trusted: whether nobody but a trusted front end can choose salts. Otherwise a salt
                is nobody's but an organisation of its own, whatever its name is.
        """
        name = (salt or "").removeprefix(SALT_TAG)
        if not name:
            return ANONYMOUS
        if is_trusted and name != EVERYONE:
            return self.of_name(name)
        return f"salt:{name}"

    def named(self, name: str) -> list[str]:
        """Return the ids of the organisations that an operator may mean by ``name``; see
        `organisations`."""
        return organisations(name, self._names.values(), self._org_header)

    def named_orgs(self) -> list[str]:
        """Return the ids of the organisations that have a name in the configuration."""
        return [f"name:{name}" for name in self._names.values()]

    def _org(self, headers: Mapping[str, str]) -> str:
        # The prefixes keep a key, a header and a name apart that happen to be the same string.
        if self._org_header and (org := headers.get(self._org_header)):
            return f"header:{org}"
        key = api_key(headers)
        if key is None:
            return ANONYMOUS
        # A header's characters are the bytes that came, whatever they mean.
        raw = key.encode("latin-1")
        if name := self._names.get(hashlib.sha256(raw).hexdigest()):
            return f"name:{name}"
        return "key:" + hmac.digest(self._secret, raw, "sha256").hex()[:16]


def organisations(name: str, names: Collection[str], org_header: str | None) -> list[str]:
    """Return the ids of the organisations that an operator may mean by ``name``; none if the name
    is no organisation's.

    Args:
        name: an id such as ``key:8f3a…``, `ANONYMOUS`, `EVERYONE`, or a name from the
            configuration or a gateway.
        names: the names in the configuration.
        org_header: the gateway's header; None to trust no header.
    """
    if name in (ANONYMOUS, EVERYONE) or name.startswith(("header:", "name:", "key:", "salt:")):
        return [name]
    return [
        *([f"name:{name}"] if name in names else ()),
        *([f"header:{name}"] if org_header else ()),
    ]


def organisation(name: str | None, names: Collection[str], org_header: str | None) -> str:
    """Return the id of the organisation that trusted code in the engine's process names.

    It is the one that HTTP requests of the same name have: with ``tenants`` or behind a gateway.

    Args:
        name: a name, or an id; None for that of requests without an API key.
        names: as of `organisations`.
        org_header: as of `organisations`.

    Raises:
        BadRequest: if this is no organisation's name.
    """
    if name is None:
        return ANONYMOUS
    if not isinstance(name, str) or name in ("", EVERYONE):
        raise BadRequest("org", name, f"an organisation's name or id; {EVERYONE!r} is a scope")
    return next(iter(organisations(name, names, org_header)), f"name:{name}")


def api_key(headers: Mapping[str, str]) -> str | None:
    """Return the API key a client presents, as OpenAI's (bearer) or Anthropic's client sends it."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token:
        return token.strip()
    return headers.get("x-api-key") or None
