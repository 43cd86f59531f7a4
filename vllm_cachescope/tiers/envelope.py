"""The envelope of a value in a remote store: a header in front of the payload.

::

    offset  bytes
    0       4      magic, b"CSKV"
    4       1      version
    5       3      zero
    8       4      TTL of the value, in seconds, little-endian
    12      16     salt
    28      16     tag

The tag is AES-GCM's, under a key of the value's own: an HMAC-SHA256 under the secret of the header
before the tag, with its random salt, and of the value's key. So the tag covers all of these and the
payload, and no two values share a key. Without the secret nobody can make a value, or move one to
another key. Until when a value lives is not said here; see `leases`.
"""

import hashlib
import hmac
import os
import struct
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from vllm_cachescope.tiers.jobs import Outgoing
from vllm_cachescope.tiers.store import Value

VERSION = 2

_MAGIC = b"CSKV"
_SALT_BYTES = 16
_TAG_BYTES = 16
_FIELDS = struct.Struct(f"<4sB3xI{_SALT_BYTES}s")

HEADER_BYTES = _FIELDS.size + _TAG_BYTES

_NONCE = bytes(12)
"""AES-GCM's nonce, the same for all values: each has a key of its own."""


class BadEnvelope(ValueError):
    """A value that must not be used. The message says of which kind it is, and no more."""


class Envelopes:
    """Seals and opens the values of one model. Their payloads are in the clear.

    Safe to use from several threads.

    Args:
        secret: that of all engines which share the store.
        namespace: the model's; see `Keyspace`.
    """

    _label = b"cachescope values "

    def __init__(self, secret: bytes, namespace: str) -> None:
        self._key = hmac.digest(secret, self._label + namespace.encode(), hashlib.sha256)

    @contextmanager
    def sealing(self, blocks: Sequence[Outgoing]) -> Iterator[list[Value]]:
        """Seal blocks. The values stay as they are inside this context."""
        yield [self._sealed(block) for block in blocks]

    @contextmanager
    def landing(self, slots: Sequence[memoryview]) -> Iterator[Sequence[memoryview]]:
        """Provide memory to read payloads into that belong into ``slots``, one after the other:
        each is brought there by `open` before the next one is read."""
        yield slots

    def open(self, key: bytes, head: bytes, payload: memoryview, slot: memoryview) -> int:
        """Bring to ``slot`` what was sealed under ``key``; return its TTL in seconds.

        Args:
            key: the value's.
            head: the header that was found.
            payload: what was found behind it, in memory from `landing`.
            slot: where it belongs.

        Raises:
            BadEnvelope: if this is not what was sealed. The slot may hold anything then.
        """
        if len(head) != HEADER_BYTES:
            raise BadEnvelope("it is too short")
        fields, tag = head[: _FIELDS.size], head[_FIELDS.size :]
        magic, version, ttl_s, _ = _FIELDS.unpack(fields)
        if magic != _MAGIC or version != VERSION:
            raise BadEnvelope(f"it is no value of version {VERSION}")
        try:
            self._open(self._cipher(key, fields), tag, payload, slot)
        except InvalidTag:
            raise BadEnvelope("its MAC does not match") from None
        return int(ttl_s)

    def _sealed(self, block: Outgoing) -> Value:
        fields = _new_fields(block.ttl_s)
        tag = self._cipher(block.key, fields).encrypt(_NONCE, b"", block.slot)
        return Value(block.key, fields + tag, block.slot, block.expires_at)

    def _open(self, cipher: AESGCM, tag: bytes, payload: memoryview, slot: memoryview) -> None:
        """Raises `InvalidTag` if the tag does not match."""
        cipher.decrypt(_NONCE, tag, payload)

    def _cipher(self, key: bytes, fields: bytes) -> AESGCM:
        # The fields have always the same length, so no two messages read alike.
        return AESGCM(hmac.digest(self._key, fields + key, hashlib.sha256))


class EncryptedEnvelopes(Envelopes):
    """Seals and opens the values of one model. Their payloads are encrypted.

    Ciphertexts stand in memory of their own: a slot that is stored stays in use, and one that is
    loaded gets the plain text straight from there, without a copy in between.

    Args:
        secret: that of all engines which share the store.
        namespace: the model's; see `Keyspace`.
        slot_bytes: bytes per block.
    """

    _label = b"cachescope encrypted values "

    def __init__(self, secret: bytes, namespace: str, slot_bytes: int) -> None:
        super().__init__(secret, namespace)
        self._sealed_bytes = slot_bytes + _TAG_BYTES
        self._free: deque[bytearray] = deque()

    @contextmanager
    def sealing(self, blocks: Sequence[Outgoing]) -> Iterator[list[Value]]:
        with self._buffers(len(blocks)) as buffers:
            yield [self._encrypted(*pair) for pair in zip(blocks, buffers, strict=True)]

    @contextmanager
    def landing(self, slots: Sequence[memoryview]) -> Iterator[Sequence[memoryview]]:
        with self._buffers(1) as (buffer,):
            yield [memoryview(buffer)[:-_TAG_BYTES]] * len(slots)

    def _encrypted(self, block: Outgoing, buffer: bytearray) -> Value:
        fields = _new_fields(block.ttl_s)
        self._cipher(block.key, fields).encrypt_into(_NONCE, block.slot, None, buffer)
        head = fields + buffer[-_TAG_BYTES:]
        return Value(block.key, head, memoryview(buffer)[:-_TAG_BYTES], block.expires_at)

    def _open(self, cipher: AESGCM, tag: bytes, payload: memoryview, slot: memoryview) -> None:
        # AES-GCM wants the tag behind the ciphertext, where `landing` has left room for it.
        buffer = cast(bytearray, payload.obj)
        buffer[-_TAG_BYTES:] = tag
        cipher.decrypt_into(_NONCE, buffer, None, slot)

    @contextmanager
    def _buffers(self, count: int) -> Iterator[list[bytearray]]:
        buffers = [self._free_buffer() for _ in range(count)]
        try:
            yield buffers
        finally:
            self._free.extend(buffers)

    def _free_buffer(self) -> bytearray:
        try:
            return self._free.pop()
        except IndexError:
            return bytearray(self._sealed_bytes)


def _new_fields(ttl_s: int) -> bytes:
    return _FIELDS.pack(_MAGIC, VERSION, ttl_s, os.urandom(_SALT_BYTES))
