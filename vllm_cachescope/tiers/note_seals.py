"""The seals of notes on sessions: what they are called in a store, and how they are encrypted.

::

    offset  bytes
    0       1      version
    1       16     salt
    17             ciphertext, and AES-GCM's tag of 16 bytes behind it

As in an `envelope`, each note has a key of its own: an HMAC-SHA256 of the salt and the note's place
under a key of its organisation, and that one under the secret. So the tag covers the place: without
the secret nobody can make a note, read one, or move one to another session or organisation. Who can
write to the store can delete notes, and bring back old ones of the same session.
"""

import hashlib
import hmac
import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from vllm_cachescope.tiers.note_store import NoteName

VERSION = 1

_HEAD = bytes((VERSION,))
_SALT_BYTES = 16
_NONCE = bytes(12)
_TAG_BYTES = 16
_DIGEST_BYTES = 16


class NoteSeals:
    """Names, seals and opens notes. Safe to use from several threads.

    Args:
        secret: that of all servers which share the store.
        model: the model's name. Servers of different models know nothing of each other's sessions,
            whose prompts have nothing in common.
    """

    def __init__(self, secret: bytes, model: str) -> None:
        self._key = hmac.digest(
            secret, b"cachescope session notes " + _bytes(model), hashlib.sha256
        )

    def name(self, account: str, org: str, session: bytes) -> NoteName:
        """Return where the notes on a session stand; empty for all sessions of ``org``."""
        key = self._key_of(org)
        return NoteName(
            hmac.digest(self._key, b"account " + _bytes(account), hashlib.sha256)[:_DIGEST_BYTES],
            hmac.digest(key, b"org", hashlib.sha256)[:_DIGEST_BYTES],
            hmac.digest(key, b"session " + session, hashlib.sha256)[:_DIGEST_BYTES]
            if session
            else b"",
        )

    def seal(self, org: str, place: bytes, plain: bytes) -> bytes:
        """Return a note sealed.

        Args:
            org: whose it is.
            place: where it stands: its session, and its name.
            plain: what it says.
        """
        salt = os.urandom(_SALT_BYTES)
        return _HEAD + salt + self._cipher(org, salt, place).encrypt(_NONCE, plain, _HEAD)

    def open(self, org: str, place: bytes, sealed: bytes) -> bytes | None:
        """Return what a note says; None if it was not sealed for that organisation and place."""
        salt, text = sealed[1 : 1 + _SALT_BYTES], sealed[1 + _SALT_BYTES :]
        if sealed[:1] != _HEAD or len(text) < _TAG_BYTES:
            return None
        try:
            return self._cipher(org, salt, place).decrypt(_NONCE, text, _HEAD)
        except InvalidTag:
            return None

    def _cipher(self, org: str, salt: bytes, place: bytes) -> AESGCM:
        # The salt has always the same length, so no two messages read alike.
        return AESGCM(hmac.digest(self._key_of(org), b"note " + salt + place, hashlib.sha256))

    def _key_of(self, org: str) -> bytes:
        return hmac.digest(self._key, b"org " + _bytes(org), hashlib.sha256)


def _bytes(name: str) -> bytes:
    # Whatever a client has sent, or made up.
    return name.encode(errors="surrogatepass")
