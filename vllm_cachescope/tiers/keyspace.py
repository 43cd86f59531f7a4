"""How entries are named in a store that several engines share."""

import hashlib
import hmac
import json
from collections.abc import Mapping
from typing import Any

from vllm_cachescope.tenancy.owner_tags import NOBODY, TAG_BYTES

FORMAT = 2
"""Grows with every change to keys or values; engines of different formats share nothing."""


class Keyspace:
    """The names of one model's entries, as one kind of engine lays them out.

    Args:
        identity: everything that two engines must have in common for the bytes of a block to
            mean the same to both: JSON-able.
    """

    def __init__(self, identity: Mapping[str, Any]) -> None:
        canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
        self.namespace = hashlib.sha256(canonical.encode()).hexdigest()[:24]
        self._prefix = f"cachescope:{FORMAT}:{self.namespace}:".encode()
        self._accounts = f"cachescope:{FORMAT}:{{{self.namespace}}}:".encode()

    def name(self, key: bytes) -> bytes:
        """Return the name of the block with ``key`` (see `qualified`)."""
        owner, block = split(key)
        org, session = owner[:TAG_BYTES].hex(), owner[TAG_BYTES:].hex()
        return self._prefix + f"{org}:{session}:{block.hex()}".encode()

    def account(self, org: bytes) -> bytes:
        """Return the name of the account of what an organisation holds. All accounts of a model
        are on one node of a Cluster."""
        return self._accounts + b"held:" + org.hex().encode()

    @property
    def accounts(self) -> bytes:
        """The name under which the organisations with accounts are listed."""
        return self._accounts + b"orgs"

    @property
    def handshake(self) -> bytes:
        """The name under which engines leave the mark of their secret."""
        return self._prefix + b"secret"


def qualified(owner: bytes, block: bytes) -> bytes:
    """Return the key that tiers and stores know a block by: its owner, block hash and group."""
    return owner + block


def split(key: bytes) -> tuple[bytes, bytes]:
    """Return the owner, and the block hash with its group, in a key `qualified` made."""
    return key[: len(NOBODY)], key[len(NOBODY) :]


def account_of(name: bytes) -> tuple[bytes, bytes]:
    """Return the account that the entry called ``name`` is in, and what it is called there: what
    its key holds besides the organisation."""
    product, version, namespace, org, session, block = name.split(b":")
    account = b":".join((product, version, b"{" + namespace + b"}", b"held", org))
    return account, bytes.fromhex((session + block).decode())


def names_of(prefix: bytes) -> bytes:
    """Return a pattern for the names of all entries, of whatever model, whose key begins with
    ``prefix``: nothing, an organisation's tag, or an owner."""
    tags = [prefix[:TAG_BYTES], prefix[TAG_BYTES:]]
    org, session = (tag.hex() or "?" * 2 * TAG_BYTES for tag in tags)
    return f"cachescope:{FORMAT}:*:{org}:{session}:*".encode()


def secret_mark(secret: bytes) -> bytes:
    """Return what tells two secrets apart without telling either."""
    return hmac.new(secret, b"cachescope handshake", hashlib.sha256).hexdigest()[:32].encode()
