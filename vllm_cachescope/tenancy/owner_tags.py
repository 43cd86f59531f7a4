"""The owner of a cached block: whose quota it counts towards, with whose blocks it is purged.

An owner is 16 bytes: an organisation's tag of 8 bytes and a session's tag of 8 bytes. A tag that
does not apply is zero: both tags of a block that everyone shares, the session's tag of a block
that an organisation shares. So a prefix of an owner names all blocks to purge at once: 0 bytes
name everything, 8 bytes an organisation with all of its sessions, 16 bytes one session.

Tags keep nobody out; the scope keys in block hashes do (see `scope`). A tag only says to whom a
block belongs, and shows no name to anyone who sees the tag in a store.
"""

from vllm_cachescope.tenancy.scope import Caller, Scope, fields_digest

TAG_BYTES = 8

NOBODY = bytes(2 * TAG_BYTES)
"""The owner of a block that everyone shares."""

EVERYONE = "global"
"""Names `NOBODY` where an operator names an organisation: in quotas, purges and reports."""


class OwnerTags:
    """Derives owners from callers by HMAC-SHA256.

    Args:
        secret: key of the HMAC.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def of(self, caller: Caller) -> bytes:
        """Return the owner of the blocks of session scope that ``caller`` computes, 16 bytes."""
        return self.prefix(caller.org, caller.session).ljust(len(NOBODY), b"\0")

    def prefix(self, org: str, session: str | None = None) -> bytes:
        """Return the first bytes of the owners of all blocks of an organisation or a session.

        Args:
            org: the organisation's id, or `EVERYONE`.
            session: a session of it; None for all of them.
        """
        if org == EVERYONE:
            return org_of(NOBODY)
        tag = self._tag("org", org)
        return tag if session is None else tag + self._tag("session", org, session)

    def _tag(self, *fields: str) -> bytes:
        # The first field keeps these digests apart from those of scope keys.
        return fields_digest(self._secret, "owner", *fields)[:TAG_BYTES]


def org_of(owner: bytes) -> bytes:
    """Return the organisation's tag in ``owner``, 8 bytes; zeros for `NOBODY`."""
    return owner[:TAG_BYTES]


def readers(scope: Scope, caller: Caller) -> Caller | None:
    """Return who may read what ``caller`` leaves behind at ``scope``: `EVERYONE`, an organisation
    or a session; None if nobody can, as without a session."""
    if scope is Scope.GLOBAL:
        return Caller(EVERYONE)
    if scope is Scope.ORG:
        return Caller(caller.org)
    return None if caller.session is None else caller


def owner_at(scope: Scope, owner: bytes) -> bytes:
    """Return the owner of a block of ``scope`` that was computed for ``owner``."""
    if scope is Scope.GLOBAL:
        return NOBODY
    if scope is Scope.ORG:
        return org_of(owner).ljust(len(NOBODY), b"\0")
    return owner
