"""Whose a cached block is: what it counts towards, and with what it is forgotten.

An owner is 16 bytes: a tag of the organisation and a tag of the session, of 8 bytes each. A block
that everyone shares has no owner, one that an organisation shares has no session; what is missing
is zero. So the first bytes of an owner name all that is purged at once: none of them everything,
8 an organisation with all of its sessions, 16 a session.

Tags keep nobody out: that is what the scope keys in block hashes are for (see `scopes`). They only
say what a block belongs to, without telling the organisation's name or the session's to anyone who
sees them in a store.
"""

from vllm_cachescope.tenancy.scope import Caller, Scope, fields_digest

TAG_BYTES = 8

NOBODY = bytes(2 * TAG_BYTES)
"""The owner of a block that everyone shares."""

EVERYONE = "global"
"""What stands for the owner of such blocks where an organisation can be named."""


class OwnerTags:
    """Derives owners from callers by HMAC-SHA256 under the operator's secret."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def of(self, caller: Caller) -> bytes:
        """Return the owner of the blocks that ``caller`` shares with nobody else."""
        return self.prefix(caller.org, caller.session).ljust(len(NOBODY), b"\0")

    def prefix(self, org: str, session: str | None = None) -> bytes:
        """Return what the owners of all blocks of ``org``, or of one session of it, begin with."""
        if org == EVERYONE:
            return org_of(NOBODY)
        tag = self._tag("org", org)
        return tag if session is None else tag + self._tag("session", org, session)

    def _tag(self, *fields: str) -> bytes:
        # The first field keeps these digests apart from those of scope keys.
        return fields_digest(self._secret, "owner", *fields)[:TAG_BYTES]


def org_of(owner: bytes) -> bytes:
    """Return the organisation's tag in an owner; zero for nobody's."""
    return owner[:TAG_BYTES]


def owner_at(scope: Scope, owner: bytes) -> bytes:
    """Return whose a block is that ``owner`` shares at ``scope``."""
    if scope is Scope.GLOBAL:
        return NOBODY
    if scope is Scope.ORG:
        return org_of(owner).ljust(len(NOBODY), b"\0")
    return owner
