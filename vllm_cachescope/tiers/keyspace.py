"""The names of entries in a store that several engines share."""

import hashlib
import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_cachescope.tenancy.owner_tags import NOBODY, TAG_BYTES, org_of

FORMAT = 3
"""Grows with every change to keys or values; engines of different formats share nothing."""


NOTE_FORMAT = 1
"""Grows with every change to the names of notes on sessions, or to the notes."""

KINDS = f"cachescope:{FORMAT}:kinds".encode()
"""The name of the hash of the kinds of engines that use a store, by their namespaces; see
`engine_kind`."""

MODELS = f"cachescope:{FORMAT}:models".encode()
"""The name of the set of the models that have entries, by their namespaces."""


class Keyspace:
    """The names of one model's entries, as one kind of engine lays them out.

    Args:
        identity: everything that two engines must have in common for the bytes of a block to
            mean the same to both, in plain data that JSON can hold.
    """

    def __init__(self, identity: Mapping[str, Any]) -> None:
        self.identity = identity
        canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
        self.namespace = hashlib.sha256(canonical.encode()).hexdigest()[:24]
        self._prefix = f"cachescope:{FORMAT}:{self.namespace}:".encode()
        self._sets_prefix = f"cachescope:{FORMAT}:{{{self.namespace}}}:".encode()

    def name(self, key: bytes) -> bytes:
        """Return the name of the block with ``key`` (see `qualified`)."""
        owner, block = split(key)
        org, session = owner[:TAG_BYTES].hex(), owner[TAG_BYTES:].hex()
        return self._prefix + f"{org}:{session}:{block.hex()}".encode()

    def usage(self, account: bytes) -> bytes:
        """Return the name of the set of the entries that count towards an account. All sets of a
        model are on one node of a Cluster."""
        return self._sets_prefix + b"held:" + account.hex().encode()

    @property
    def accounts(self) -> bytes:
        """The name of the set of accounts that hold entries."""
        return self._sets_prefix + b"accounts"

    @property
    def handshake(self) -> bytes:
        """The name under which engines leave the digest of their secret."""
        return self._prefix + b"secret"


@dataclass(frozen=True, slots=True)
class OwnerNames:
    """The names of the sets that say which of a model's entries are whose; see `owner_index`.

    Attributes:
        namespace: the model's.
    """

    namespace: bytes

    def sessions(self, org: bytes) -> bytes:
        """Return the name of the set of an organisation's sessions."""
        return self._sets + b"sessions:" + org.hex().encode()

    def entries(self, org: bytes, session: bytes) -> bytes:
        """Return the name of the set of the blocks of an owner's entries."""
        return self._sets + f"entries:{org.hex()}:{session.hex()}".encode()

    @property
    def began(self) -> bytes:
        """The name under which stands which server began these sets."""
        return self._sets + b"began"

    @property
    def _sets(self) -> bytes:
        return b"cachescope:%d:{%b}:" % (FORMAT, self.namespace)

    def entry(self, org: bytes, session: bytes, block: bytes) -> bytes:
        """Return the name of an entry, as `Keyspace.name` does."""
        key = f"{org.hex()}:{session.hex()}:{block.hex()}"
        return b"cachescope:%d:%b:%b" % (FORMAT, self.namespace, key.encode())


@dataclass(frozen=True, slots=True)
class PurgeLogNames:
    """The names of the purge log of all engines with one secret, of whatever model; see
    `purge_log`. They are on one node of a Cluster.

    Attributes:
        secret_digest: see `secret_digest`.
    """

    secret_digest: bytes

    @property
    def log(self) -> bytes:
        """The name of the set of notices."""
        return self._prefix + b"log"

    @property
    def cut(self) -> bytes:
        """The name of the position of the last notice that went before its time."""
        return self._prefix + b"cut"

    @property
    def followers(self) -> bytes:
        """The name of the hash of the engines that follow."""
        return self._prefix + b"followers"

    @property
    def _prefix(self) -> bytes:
        return b"cachescope:%d:{purges}:%b:" % (FORMAT, self.secret_digest)


@dataclass(frozen=True, slots=True)
class NoteNames:
    """The names of the notes on sessions under one secret; see `note_store`. Those of one account
    are on one node of a Cluster.

    Attributes:
        secret_digest: see `secret_digest`.
    """

    secret_digest: bytes

    def index(self, account: bytes) -> bytes:
        """Return the name of the set of an account's sessions, by when their notes expire."""
        return self._of(account) + b"index"

    def sizes(self, account: bytes) -> bytes:
        """Return the name of the hash of what their notes take up, in bytes."""
        return self._of(account) + b"sizes"

    def notes(self, account: bytes, session: bytes) -> bytes:
        """Return the name of the hash of the notes on a session of an account."""
        return self._of(account) + b"notes:" + session.hex().encode()

    def _of(self, account: bytes) -> bytes:
        return self.prefix + b"{" + account.hex().encode() + b"}:"

    @property
    def all(self) -> bytes:
        """A pattern for all of these names."""
        return self.prefix + b"*"

    @property
    def prefix(self) -> bytes:
        """What all of these names begin with."""
        return b"cachescope:sessions:%d:%b:" % (NOTE_FORMAT, self.secret_digest)


HANDSHAKES = f"cachescope:{FORMAT}:*:secret".encode()
"""A pattern for the names under which engines leave the digests of their secrets, of whatever
model."""


def qualified(owner: bytes, block: bytes) -> bytes:
    """Return the key that tiers and stores know a block by: its owner, block hash and group. Who
    wrote what everyone shares is left out: whoever reads it does not know."""
    return (NOBODY if org_of(owner) == org_of(NOBODY) else owner) + block


def split(key: bytes) -> tuple[bytes, bytes]:
    """Return the owner, and the block hash with its group, in a key `qualified` made."""
    return key[: len(NOBODY)], key[len(NOBODY) :]


def key_in(name: bytes) -> bytes:
    """Return the key of an entry (see `qualified`) by its name, of whatever model."""
    org, session, block = name.split(b":")[3:]
    return bytes.fromhex((org + session + block).decode())


def usage_beside(name: bytes, account: bytes) -> bytes:
    """Return the name of the set of an account (see `Keyspace.usage`) of the model that an entry's
    name is of."""
    product, version, namespace = name.split(b":")[:3]
    return b":".join((product, version, b"{" + namespace + b"}", b"held", account.hex().encode()))


def names_of(prefix: bytes) -> bytes:
    """Return a pattern for the names of all entries, of whatever model, whose key begins with
    ``prefix``: nothing, an organisation's tag, or an owner."""
    tags = [prefix[:TAG_BYTES], prefix[TAG_BYTES:]]
    org, session = (tag.hex() or "?" * 2 * TAG_BYTES for tag in tags)
    return f"cachescope:{FORMAT}:*:{org}:{session}:*".encode()


def secret_digest(secret: bytes) -> bytes:
    """Return a digest that differs for two secrets, and reveals neither of them."""
    return hmac.new(secret, b"cachescope handshake", hashlib.sha256).hexdigest()[:32].encode()
