"""What engines tell each other of purges in a purge log: readable with the secret only."""

import hashlib
import hmac
import json
from binascii import hexlify, unhexlify
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

_NONCE_BYTES = 12


@dataclass(frozen=True, slots=True)
class PurgeNotice:
    """A purge that other engines are to carry out as well.

    Attributes:
        purge_id: of the purge, the same in all engines that were asked for it together.
        prefix: what the owners of the entries begin with: nothing, an organisation's tag, an owner.
        org: the organisation's id; None for all.
        session: the session; None for all of the organisation's.
    """

    purge_id: str
    prefix: bytes
    org: str | None = None
    session: str | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an engine has come.

    Attributes:
        name: what an operator knows the engine by.
        position: up to where it has carried out what the log says.
    """

    name: str
    position: int


class PurgeNotices:
    """Seals and opens notices, and the progress of engines: nobody without the secret may have
    engines purge, claim that one has, or read names.

    Args:
        secret: that of all engines which share the store.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def seal(self, notice: PurgeNotice) -> bytes:
        """Return a notice sealed; the same bytes for the same notice."""
        prefix = hexlify(notice.prefix).decode()
        return self._seal(b"notice", [notice.purge_id, prefix, notice.org, notice.session])

    def open(self, sealed: bytes) -> PurgeNotice | None:
        """Return the notice; None if it was not sealed under this secret."""
        if (fields := self._open(b"notice", sealed)) is None:
            return None
        # A later version may say more.
        purge_id, prefix, org, session = fields[:4]
        return PurgeNotice(purge_id, unhexlify(prefix), org, session)

    def claim(self, follower_id: bytes, progress: Progress) -> bytes:
        """Return the progress of a follower sealed."""
        return self._seal(b"progress of " + follower_id, [progress.name, progress.position])

    def progress(self, follower_id: bytes, sealed: bytes) -> Progress | None:
        """Return the progress of a follower; None if it was not sealed under this secret."""
        fields = self._open(b"progress of " + follower_id, sealed)
        return None if fields is None else Progress(*fields[:2])

    def _seal(self, label: bytes, fields: list[Any]) -> bytes:
        plain = json.dumps(fields).encode()
        # Two plain texts never have the same nonce, nor has one two ciphertexts.
        nonce = hmac.digest(self._key(b"nonces"), label + plain, hashlib.sha256)[:_NONCE_BYTES]
        return nonce + AESGCM(self._key(b"texts")).encrypt(nonce, plain, label)

    def _open(self, label: bytes, sealed: bytes) -> list[Any] | None:
        nonce, text = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
        try:
            plain = AESGCM(self._key(b"texts")).decrypt(nonce, text, label)
        except (InvalidTag, ValueError):
            return None
        fields: list[Any] = json.loads(plain)
        return fields

    def _key(self, use: bytes) -> bytes:
        return hmac.digest(self._secret, b"cachescope purge log: " + use, hashlib.sha256)
