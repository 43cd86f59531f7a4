"""Who may reuse a cached block, and the keyed hashes that keep everyone else out."""

import hashlib
import hmac
from dataclasses import dataclass
from enum import IntEnum

MAX_NAME = 256
"""Most characters of a session's name that are kept: clients choose these names."""


class Scope(IntEnum):
    """How widely a cached block is shared. A larger value is narrower."""

    GLOBAL = 0
    ORG = 1
    SESSION = 2

    @classmethod
    def parse(cls, name: str) -> "Scope":
        """Return the scope called ``name``: ``"global"``, ``"org"`` or ``"session"``.

        Raises:
            KeyError: if there is no such scope.
        """
        return _BY_NAME[name]

    @property
    def label(self) -> str:
        """The name used in requests, configuration and metric labels."""
        return _LABELS[self]


_LABELS = {scope: scope.name.lower() for scope in Scope}
_BY_NAME = {label: scope for scope, label in _LABELS.items()}


def short_name(name: str) -> str:
    """Return ``name``, cut to `MAX_NAME` characters. Two long names stay different."""
    if len(name) <= MAX_NAME:
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{name[: MAX_NAME - len(digest) - 1]}~{digest}"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a request.

    Attributes:
        org: the organisation's id, from something the client cannot forge.
        session: the conversation inside the organisation, its name cut by `short_name`; None when
            the client named none.
    """

    org: str
    session: str | None = None

    def __post_init__(self) -> None:
        if self.session is not None and len(self.session) > MAX_NAME:
            object.__setattr__(self, "session", short_name(self.session))


class ScopeKeys:
    """Derives the key that enters a block's hash from the scope the block is shared at.

    Two blocks of equal tokens have equal hashes only if their scope keys are equal, so scopes are
    isolated wherever blocks are found by hash. Keys are HMAC-SHA256 under the operator's secret:
    without the secret, nobody can name another organisation's blocks.

    Args:
        secret: key of the HMAC.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def key(self, scope: Scope, caller: Caller, request_nonce: str) -> str:
        """Return the hex key of ``scope`` for ``caller``.

        For session scope and a caller without a session the key is derived from
        ``request_nonce``, which must be unique to the request: no block of that key is found again.
        """
        if scope is Scope.GLOBAL:
            return self._digest("global")
        if scope is Scope.ORG:
            return self._digest("org", caller.org)
        if caller.session is None:
            return self.private_key(request_nonce)
        return self._digest("session", caller.org, caller.session)

    def private_key(self, request_nonce: str) -> str:
        """Return the hex key of a block that nobody, the same caller included, may reuse."""
        return self._digest("private", request_nonce)

    def _digest(self, *fields: str) -> str:
        return fields_digest(self._secret, *fields).hex()[:32]


def fields_digest(secret: bytes, *fields: str) -> bytes:
    """Return the HMAC-SHA256 of ``fields``; no two lists of fields have the same message."""
    # Each field is preceded by its length: ("a", "bc") and ("ab", "c") must differ. JSON lets
    # clients send lone surrogates.
    message = b"".join(
        len(raw).to_bytes(4, "big") + raw
        for raw in (field.encode("utf-8", "surrogatepass") for field in fields)
    )
    return hmac.digest(secret, message, "sha256")
