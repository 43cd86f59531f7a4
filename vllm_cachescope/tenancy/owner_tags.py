"""The owner of a cached block: whose quota it counts towards, with whose blocks it is purged.

An owner is 16 bytes: an organisation's tag of 8 bytes and a session's tag of 8 bytes. The session's
tag of a block that an organisation shares is zero. What everyone shares belongs to no organisation:
its first tag is zero, and its second one is the tag of the organisation that wrote it. So a prefix
of an owner names all blocks to purge at once: 0 bytes name everything, 8 bytes an organisation with
all of its sessions, 16 bytes one session.

The first bit of an organisation's tag says that anyone could have made the organisation up: it is
"unlisted". Wherever blocks are counted, that shows without a list of organisations.

Tags keep nobody out; the scope keys in block hashes do (see `scope`). A tag only says to whom a
block belongs, and shows no name to anyone who sees the tag in a store.
"""

from collections.abc import Iterator

from vllm_cachescope.tenancy.scope import Caller, Scope, fields_digest

TAG_BYTES = 8

NOBODY = bytes(2 * TAG_BYTES)
"""The owner of a block that everyone shares, where it does not matter who wrote it."""

UNLISTED_TAG = b"\x80" + bytes(TAG_BYTES - 1)
"""Stands for all unlisted organisations together. Their tags have its one bit."""

EVERYONE = "global"
"""Names `NOBODY` where an operator names an organisation: in quotas, purges and reports."""


class OwnerTags:
    """Derives owners from callers by HMAC-SHA256.

    Args:
        secret: key of the HMAC.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def of(self, caller: Caller, is_listed: bool = True) -> bytes:
        """Return the owner of the blocks of session scope that ``caller`` computes, 16 bytes.

        Args:
            caller: the caller.
            is_listed: whether the organisation is one that nobody can make up.
        """
        return self.prefix(caller.org, caller.session, is_listed).ljust(len(NOBODY), b"\0")

    def prefix(self, org: str, session: str | None = None, is_listed: bool = True) -> bytes:
        """Return the first bytes of the owners of all blocks of an organisation or a session.

        Args:
            org: the organisation's id, or `EVERYONE`.
            session: a session of it; None for all of them.
            is_listed: whether the organisation is one that nobody can make up.
        """
        if org == EVERYONE:
            return org_of(NOBODY)
        tag = self._tag("org", org)
        first = tag[0] & 0x7F if is_listed else tag[0] | 0x80
        tag = bytes([first]) + tag[1:]
        return tag if session is None else tag + self._tag("session", org, session)

    def prefixes(self, org: str, session: str | None = None) -> Iterator[bytes]:
        """Yield every prefix that `prefix` may return. An organisation of an API key without a name
        has two: of two servers with one store, one may insist on the key. So has one of a salt."""
        yield self.prefix(org, session)
        if org.startswith(("key:", "salt:")):
            yield self.prefix(org, session, is_listed=False)

    def _tag(self, *fields: str) -> bytes:
        # The first field keeps these digests apart from those of scope keys.
        return fields_digest(self._secret, "owner", *fields)[:TAG_BYTES]


def org_of(owner: bytes) -> bytes:
    """Return the organisation's tag in ``owner``, 8 bytes; zeros for what everyone shares."""
    return owner[:TAG_BYTES]


def is_unlisted(tag: bytes) -> bool:
    """Whether an organisation's tag is that of an unlisted one."""
    return bool(tag and tag[0] & 0x80)


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
        return bytes(TAG_BYTES) + org_of(owner)
    if scope is Scope.ORG:
        return org_of(owner).ljust(len(NOBODY), b"\0")
    return owner
