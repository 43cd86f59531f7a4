"""The names of entries in a store that several engines share."""

import hashlib
import hmac
import json
from collections.abc import Mapping
from typing import Any

from vllm_cachescope.tenancy.owner_tags import NOBODY, TAG_BYTES

FORMAT = 3
"""Grows with every change to keys or values; engines of different formats share nothing."""


class Keyspace:
    """The names of one model's entries, as one kind of engine lays them out.

    Args:
        identity: everything that two engines must have in common for the bytes of a block to
            mean the same to both, in plain data that JSON can hold.
    """

    def __init__(self, identity: Mapping[str, Any]) -> None:
        canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
        self.namespace = hashlib.sha256(canonical.encode()).hexdigest()[:24]
        self._prefix = f"cachescope:{FORMAT}:{self.namespace}:".encode()
        self._usage_prefix = f"cachescope:{FORMAT}:{{{self.namespace}}}:".encode()

    def name(self, key: bytes) -> bytes:
        """Return the name of the block with ``key`` (see `qualified`)."""
        owner, block = split(key)
        org, session = owner[:TAG_BYTES].hex(), owner[TAG_BYTES:].hex()
        return self._prefix + f"{org}:{session}:{block.hex()}".encode()

    def usage(self, org: bytes) -> bytes:
        """Return the name of the set of entries that an organisation holds. All such sets of a
        model are on one node of a Cluster."""
        return self._usage_prefix + b"held:" + org.hex().encode()

    @property
    def usage_orgs(self) -> bytes:
        """The name of the set of organisations that hold entries."""
        return self._usage_prefix + b"orgs"

    @property
    def handshake(self) -> bytes:
        """The name under which engines leave the digest of their secret."""
        return self._prefix + b"secret"


HANDSHAKES = f"cachescope:{FORMAT}:*:secret".encode()
"""A pattern for the names under which engines leave the digests of their secrets, of whatever
model."""


def qualified(owner: bytes, block: bytes) -> bytes:
    """Return the key that tiers and stores know a block by: its owner, block hash and group."""
    return owner + block


def split(key: bytes) -> tuple[bytes, bytes]:
    """Return the owner, and the block hash with its group, in a key `qualified` made."""
    return key[: len(NOBODY)], key[len(NOBODY) :]


def usage_of(name: bytes) -> tuple[bytes, bytes]:
    """Return the set in which an entry is counted, and the entry's name there.

    Args:
        name: the entry's, as `Keyspace.name` returns it, of whatever model.

    Returns:
        The name of the organisation's set (see `Keyspace.usage`), and the entry's name in that
        set: what its key holds besides the organisation.
    """
    product, version, namespace, org, session, block = name.split(b":")
    usage = b":".join((product, version, b"{" + namespace + b"}", b"held", org))
    return usage, bytes.fromhex((session + block).decode())


def names_of(prefix: bytes) -> bytes:
    """Return a pattern for the names of all entries, of whatever model, whose key begins with
    ``prefix``: nothing, an organisation's tag, or an owner."""
    tags = [prefix[:TAG_BYTES], prefix[TAG_BYTES:]]
    org, session = (tag.hex() or "?" * 2 * TAG_BYTES for tag in tags)
    return f"cachescope:{FORMAT}:*:{org}:{session}:*".encode()


def secret_digest(secret: bytes) -> bytes:
    """Return a digest that differs for two secrets, and reveals neither of them."""
    return hmac.new(secret, b"cachescope handshake", hashlib.sha256).hexdigest()[:32].encode()
