"""How entries are named in a store that several engines share."""

import hashlib
import hmac
import json
from collections.abc import Mapping
from typing import Any

FORMAT = 1
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

    def name(self, key: bytes) -> bytes:
        """Return the name of the block with ``key`` (block hash and group)."""
        return self._prefix + key.hex().encode()

    @property
    def handshake(self) -> bytes:
        """The name under which engines leave the mark of their secret."""
        return self._prefix + b"secret"


def secret_mark(secret: bytes) -> bytes:
    """Return what tells two secrets apart without telling either."""
    return hmac.new(secret, b"cachescope handshake", hashlib.sha256).hexdigest()[:32].encode()
