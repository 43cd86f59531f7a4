"""The seal of a plan on its way to the engine: clients may send `kv_transfer_params` of their own,
and a MAC is what keeps them from sending a plan."""

import hashlib
import hmac
import json
from collections.abc import Mapping
from typing import Any


def sealed(
    kind: str, key: str, spans: list[Any], nonce: str, owner: bytes, secret: bytes
) -> dict[str, Any]:
    """Return a plan as JSON-able data with a MAC.

    Args:
        kind: what sort of plan it is: data of one kind is none of another.
        key: under which key the spans stand.
        spans: its spans, JSON-able.
        nonce: its nonce.
        owner: its owner.
        secret: key of the MAC.
    """
    mac = _mac(kind, spans, nonce, owner.hex(), secret)
    return {key: spans, "nonce": nonce, "owner": owner.hex(), "mac": mac}


def opened(
    kind: str, key: str, data: Mapping[str, Any], secret: bytes
) -> tuple[list[Any], str, bytes] | None:
    """Return spans, nonce and owner of what `sealed` made; None if ``data`` is not of that kind, or
    was not made with ``secret``."""
    spans, nonce, owner, mac = (data.get(name) for name in (key, "nonce", "owner", "mac"))
    if not isinstance(spans, list):
        return None
    if not (isinstance(nonce, str) and isinstance(owner, str) and isinstance(mac, str)):
        return None
    try:
        expected = _mac(kind, spans, nonce, owner, secret)
        genuine = hmac.compare_digest(expected.encode(), mac.encode())
    except (TypeError, ValueError, RecursionError):
        # `sealed` makes nothing that cannot be encoded.
        return None
    return (spans, nonce, bytes.fromhex(owner)) if genuine else None


def _mac(kind: str, spans: list[Any], nonce: str, owner: str, secret: bytes) -> str:
    message = json.dumps([kind, spans, nonce, owner], separators=(",", ":")).encode()
    return hmac.new(secret, message, hashlib.sha256).hexdigest()[:32]
