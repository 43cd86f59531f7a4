"""The lease of an entry in a remote store: until when the entry lives, under the secret.

::

    offset  bytes
    0       8      end, in ms of Unix time, little-endian
    8       16     tag

The tag covers the entry's name and the end. It does not cover the value: an entry in use gets a new
lease, and nobody has to know the value's header for that, let alone write the value again. A name
holds the hash of what the value was computed from, so every genuine value of a name is as good as
any other. What is left to a forger are the leases that engines have granted, none of which ends
later than some engine wanted the entry to live.
"""

import hashlib
import hmac
import struct

_END = struct.Struct("<Q")
_TAG_BYTES = 16

LEASE_BYTES = _END.size + _TAG_BYTES


class Leases:
    """Grants leases under a secret, and reads them. Safe to use from several threads.

    Args:
        secret: the secret of all engines that share the store.
    """

    def __init__(self, secret: bytes) -> None:
        self._key = hmac.digest(secret, b"cachescope leases", hashlib.sha256)

    def grant(self, name: bytes, ends_at_ms: int) -> bytes:
        """Return a lease.

        Args:
            name: the entry's, which no other entry of any model has.
            ends_at_ms: until when the entry lives, in ms of Unix time.
        """
        end = _END.pack(ends_at_ms)
        return end + self._tag(name, end)

    def end(self, name: bytes, lease: bytes) -> int | None:
        """Return when a lease of the entry called ``name`` ends, in ms of Unix time; None if
        `grant` has not made it for that name and under this secret."""
        end = lease[: _END.size]
        if not hmac.compare_digest(self._tag(name, end), lease[_END.size :]):
            return None
        return claimed_end(lease)

    def _tag(self, name: bytes, end: bytes) -> bytes:
        # The end has always the same length, so no two messages read alike.
        return hmac.digest(self._key, end + name, hashlib.sha256)[:_TAG_BYTES]


def claimed_end(lease: bytes) -> int:
    """Return when a lease says that it ends, in ms of Unix time, whoever has written it."""
    (ends_at_ms,) = _END.unpack_from(lease)
    return int(ends_at_ms)
