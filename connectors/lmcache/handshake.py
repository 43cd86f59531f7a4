"""The handshake with a store behind an adapter: it keeps, it deletes, its secret is ours."""

import hashlib
import struct
from collections.abc import Callable

from lmcache.v1.distributed.api import ObjectKey

from vllm_cachescope.connectors.lmcache.adapters import Entry, Kind, name
from vllm_cachescope.connectors.lmcache.memory import Staging
from vllm_cachescope.connectors.lmcache.records import put
from vllm_cachescope.connectors.lmcache.session import Session
from vllm_cachescope.tiers.store import ForeignSecret, StoreFailed, StoreUnfit

SECRET_S = 60.0
"""How long the digest of a secret outlives the last engine that has it, in seconds."""

_RECORD = struct.Struct("<Q32s8s")
"""When it expires, in ms of Unix time; the digest of a secret; a checksum of the two. There is no
MAC: engines with another secret must be able to read it."""


class Handshake:
    """Makes sure that a tier may run on a store, and leaves the digest of our secret there.

    Args:
        staging: memory for the objects on their way.
        namespace: of this engine's entries.
        secret_digest: tells our secret from others; see `keyspace.secret_digest`.
        now_ms: returns Unix time in ms.
    """

    def __init__(
        self,
        staging: Staging,
        namespace: str,
        secret_digest: bytes,
        now_ms: Callable[[], int],
    ) -> None:
        self._staging = staging
        self._secret = name(Entry(namespace, b""), Kind.SECRET)
        self._secret_digest = secret_digest
        self._now_ms = now_ms

    def shake(self, session: Session, deadline: float) -> None:
        """Make sure that the adapter keeps and deletes what it is told to, and that no engine
        with another secret is there.

        Raises:
            StoreFailed: if it does not answer.
            StoreUnfit: if the tier must not run on it.
        """
        canary, secret = session.canary, self._secret
        there, signed = session.lookup([canary, secret], deadline)
        if not there:
            put(session, self._staging, {canary: b""}, deadline)
            if not session.lookup([canary], deadline)[0]:
                raise StoreFailed("it does not hold what was stored in it")
        now_ms = self._now_ms()
        until_ms = 0
        if signed:
            until_ms, digest = self._read_digest(session, secret, deadline)
            if until_ms > now_ms and digest != self._secret_digest:
                raise ForeignSecret(
                    "another engine that serves this model uses it with another secret. Give all "
                    "replicas the same secret; after a change of the secret this tier starts by "
                    f"itself, {SECRET_S:.0f} s after the last engine with the old one has gone"
                )
        if until_ms < now_ms + SECRET_S * 1000 * 2 / 3:
            session.drop([secret], deadline)
            if session.lookup([secret], deadline)[0]:
                raise StoreUnfit("it does not delete: nothing in it would ever expire")
            record = _packed(now_ms + int(SECRET_S * 1000), self._secret_digest)
            put(session, self._staging, {secret: record}, deadline)

    def undo(self, session: Session, deadline: float) -> None:
        """Delete what `shake` leaves in the store. No engine may use the namespace.

        Raises:
            StoreFailed: if it does not answer.
        """
        session.drop([session.canary, self._secret], deadline)

    def _read_digest(
        self, session: Session, secret: ObjectKey, deadline: float
    ) -> tuple[int, bytes]:
        buffers = self._staging.records.take(1)
        with session.loading([secret], buffers) as tasks:
            if session.wait(tasks[0], deadline)[0]:
                return _unpacked(bytes(buffers[0].view[: _RECORD.size]))
        raise StoreFailed("the digest of a secret does not load")


def _packed(until_ms: int, digest: bytes) -> bytes:
    checksum = hashlib.sha256(b"%d %b" % (until_ms, digest)).digest()
    return _RECORD.pack(until_ms, digest, checksum)


def _unpacked(record: bytes) -> tuple[int, bytes]:
    """Return what a record says; one that is damaged has expired."""
    until_ms, digest, _ = _RECORD.unpack(record)
    return (until_ms, digest) if record == _packed(until_ms, digest) else (0, digest)
