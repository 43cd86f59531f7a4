"""A request's body as JSON.

pydantic's parser and serialiser are several times faster than `json` on a long prompt, but
stricter. Bodies that they refuse are left to `json`, with which vLLM itself reads bodies.
"""

import json
from typing import Any

from pydantic_core import PydanticSerializationError, from_json, to_json


def decode(raw: bytes) -> Any:
    """Return the JSON value in ``raw``; None if it is not JSON."""
    try:
        return from_json(raw)
    except ValueError:
        try:
            return json.loads(raw)
        except (ValueError, RecursionError):
            return None


def encode(value: Any) -> bytes:
    """Return ``value``, which consists of what `decode` returns, as JSON."""
    try:
        return to_json(value, inf_nan_mode="constants")
    except (PydanticSerializationError, ValueError):
        # Half of a surrogate pair, which UTF-8 cannot hold and an escape can.
        return json.dumps(value, separators=(",", ":")).encode()
